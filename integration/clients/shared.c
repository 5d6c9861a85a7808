/*
 * Registration of memory that is shared already: it stays the same memory for all who share it, and when it is taken away
 * that is an error of the requests that need it, and of nobody else.
 *
 *   shared list | shared CASE
 *
 * A case that this machine has no means for prints SKIPPED and why.
 */
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	LENGTH = 64 * PAGE,
	REMOTE = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ,
};

static struct loop loop;
/* As by a card, which goes on with pages that their file has lost. */
static bool pinned;

static unsigned char *map(size_t length, int protection, int flags, int fd)
{
	unsigned char *at = mmap(NULL, length, protection, flags, fd, 0);

	CHECK(at != MAP_FAILED, "errno %d", errno);
	return at;
}

static unsigned char *map_shared(size_t length, int fd)
{
	return map(length, PROT_READ | PROT_WRITE, MAP_SHARED, fd);
}

static int memory_file(size_t length)
{
	int fd = memfd_create("shared", MFD_CLOEXEC);

	CHECK(fd >= 0, "errno %d", errno);
	CHECK_EQ(ftruncate(fd, length), 0);
	return fd;
}

/* A name in /dev/shm that no other process of this test has. */
static const char *name(void)
{
	static char text[64];

	snprintf(text, sizeof(text), "/ringfence-shared-%d", (int)getpid());
	return text;
}

static int named_file(size_t length)
{
	int fd = shm_open(name(), O_RDWR | O_CREAT | O_EXCL, 0600);

	CHECK(fd >= 0, "errno %d", errno);
	CHECK_EQ(ftruncate(fd, length), 0);
	return fd;
}

static struct ibv_mr *reg(void *at, size_t length)
{
	struct ibv_mr *mr = ibv_reg_mr(loop.pd, at, length, REMOTE);

	CHECK(mr, "errno %d", errno);
	return mr;
}

/* Bytes travel from `at` to private memory and, changed, back; whoever else maps the same memory sees them. */
static void round_trip(unsigned char *at, const unsigned char *elsewhere, size_t length)
{
	unsigned char *other = map(length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct ibv_mr *mr = reg(at, length), *other_mr = reg(other, length);

	loop_fill(at, length, 1);
	loop_write(&loop, other_mr, other, mr, at, length);
	loop_check_filled(other, length, 1);
	loop_fill(other, length, 2);
	loop_write(&loop, mr, at, other_mr, other, length);
	loop_check_filled(at, length, 2);
	loop_check_filled(elsewhere, length, 2);
	loop_dereg(mr);
	loop_dereg(other_mr);
	loop_check_filled(elsewhere, length, 2);
	at[0] ^= 0xff;
	CHECK_EQ(at[0], elsewhere[0]);
	munmap(other, length);
}

static void a_memory_file(void)
{
	int fd = memory_file(LENGTH);

	round_trip(map_shared(LENGTH, fd), map_shared(LENGTH, fd), LENGTH);
	/* Neither whole pages nor from the file's beginning. */
	round_trip(map_shared(LENGTH, fd) + 3 * PAGE + 5, map_shared(LENGTH, fd) + 3 * PAGE + 5, 9 * PAGE + 77);
}

static void a_file_with_a_name_whose_descriptor_is_closed(void)
{
	int fd = named_file(LENGTH);
	unsigned char *at = map_shared(LENGTH, fd), *elsewhere = map_shared(LENGTH, fd);

	close(fd);
	round_trip(at, elsewhere, LENGTH);
	shm_unlink(name());
}

static void a_file_that_another_descriptor_only_reads(void)
{
	int fd = named_file(LENGTH);
	unsigned char *at = map_shared(LENGTH, fd), *elsewhere = map_shared(LENGTH, fd);
	int reading = shm_open(name(), O_RDONLY, 0);

	CHECK(reading >= 0);
	close(fd);
	round_trip(at, elsewhere, LENGTH);
	close(reading);
	shm_unlink(name());
}

/* Only the privileged get at such a file; others are told so, and keep what they have. */
static void files_that_cannot_be_had(void)
{
	unsigned char *anonymous = map(LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	int id = shmget(IPC_PRIVATE, LENGTH, IPC_CREAT | 0600), fd = named_file(LENGTH);
	unsigned char *segment = shmat(id, NULL, 0), *unlinked = map_shared(LENGTH, fd);
	unsigned char *all[] = {anonymous, segment, unlinked};

	CHECK(segment != (void *)-1, "errno %d", errno);
	shmctl(id, IPC_RMID, NULL);
	close(fd);
	shm_unlink(name());
	for (int i = 0; i < 3; i++) {
		struct ibv_mr *mr = ibv_reg_mr(loop.pd, all[i], LENGTH, REMOTE);

		if (mr) {
			loop_dereg(mr);
			round_trip(all[i], all[i], LENGTH);
		} else {
			CHECK(errno == EOPNOTSUPP, "kind %d: errno %d", i, errno);
			loop_fill(all[i], LENGTH, 7);
			loop_check_filled(all[i], LENGTH, 7);
		}
	}
}

/* Each writes into its half by verbs of its own, and both see both halves. */
static void two_processes(void)
{
	enum { HALF = LENGTH / 2 };
	unsigned char *at = map_shared(LENGTH, memory_file(LENGTH));
	_Atomic int *turn = (_Atomic int *)map(PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	unsigned char *own = map(HALF, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	pid_t child = fork();

	CHECK(child >= 0, "errno %d", errno);
	if (!child)
		loop = loop_open();
	int me = child ? 0 : 1, status;
	struct ibv_mr *mr = reg(at, LENGTH), *own_mr = reg(own, HALF);

	for (int round = 0; round < 20; round++) {
		while (atomic_load(turn) != 2 * round + me) {
			CHECK(!child || waitpid(child, &status, WNOHANG) == 0, "the child has ended: status %d", status);
			sched_yield();
		}
		if (me)
			loop_check_filled(at, HALF, round);
		else if (round)
			loop_check_filled(at + HALF, HALF, 100 + round - 1);
		loop_fill(own, HALF, 100 * me + round);
		loop_write(&loop, mr, at + me * HALF, own_mr, own, HALF);
		loop_check_filled(at + me * HALF, HALF, 100 * me + round);
		atomic_fetch_add(turn, 1);
	}
	loop_dereg(mr);
	if (!child)
		_exit(0);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %#x", status);
	loop_check_filled(at + HALF, HALF, 119);
}

static void only_to_be_read(void)
{
	static const unsigned char constant[3 * PAGE] = {1, 2, 3};
	int fd = memory_file(LENGTH);
	unsigned char *writable = map_shared(LENGTH, fd), *at = map(LENGTH, PROT_READ, MAP_SHARED, fd);
	int self = open("/proc/self/exe", O_RDONLY);
	unsigned char *program = map(PAGE, PROT_READ, MAP_PRIVATE, self);
	unsigned char *other = map(LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct ibv_mr *other_mr = reg(other, LENGTH);
	const unsigned char *read_only[] = {at, constant, program};

	loop_fill(writable, LENGTH, 3);
	for (int i = 0; i < 3; i++) {
		size_t length = i == 0 ? LENGTH : i == 1 ? sizeof(constant) : PAGE;

		CHECK(!ibv_reg_mr(loop.pd, (void *)read_only[i], length, IBV_ACCESS_LOCAL_WRITE), "kind %d", i);
		CHECK(errno == EFAULT, "kind %d: errno %d", i, errno);
		for (int access = 0; access <= IBV_ACCESS_REMOTE_READ; access += IBV_ACCESS_REMOTE_READ) {
			struct ibv_mr *mr = ibv_reg_mr(loop.pd, (void *)read_only[i], length, access);

			CHECK(mr, "kind %d, access %d: errno %d", i, access, errno);
			memset(other, 0, length);
			loop_write(&loop, other_mr, other, mr, (void *)read_only[i], length);
			CHECK(!memcmp(other, read_only[i], length), "kind %d", i);
			loop_dereg(mr);
		}
	}
	loop_fill(writable, LENGTH, 4);
	loop_check_filled(at, LENGTH, 4);
}

/* What a file system must know of, or a device serves. */
static void files_of_other_kinds(void)
{
	char path[] = "/var/tmp/ringfence-shared-XXXXXX";
	int fd = mkstemp(path);

	CHECK(fd >= 0, "errno %d", errno);
	CHECK_EQ(ftruncate(fd, LENGTH), 0);
	unsigned char *at = map_shared(LENGTH, fd);
	struct ibv_mr *mr = ibv_reg_mr(loop.pd, at, LENGTH, REMOTE);

	/* On a machine where that is memory it is as good as any. */
	CHECK(mr || errno == EFAULT || errno == EOPNOTSUPP, "errno %d", errno);
	if (!mr && ibv_reg_mr(loop.pd, at, LENGTH, IBV_ACCESS_REMOTE_READ))
		CHECK(!"a file on disk was registered");
	unlink(path);
	/* A private mapping of it is memory like any other. */
	at = map(LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
	round_trip(at, at, LENGTH);
	unsigned char *beyond = map_shared(2 * PAGE, memory_file(PAGE));

	CHECK(!ibv_reg_mr(loop.pd, beyond, 2 * PAGE, REMOTE));
	CHECK_EQ(errno, EFAULT);
}

/* The status of one WRITE, offsets from the regions' beginnings. */
static enum ibv_wc_status outcome(struct ibv_mr *to, size_t to_offset, struct ibv_mr *from, size_t from_offset, uint32_t length)
{
	struct ibv_sge sge = {(uintptr_t)from->addr + from_offset, length, from->lkey};
	struct ibv_send_wr *bad, wr = {.wr_id = 1, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
				       .send_flags = IBV_SEND_SIGNALED,
				       .wr.rdma = {(uintptr_t)to->addr + to_offset, to->rkey}};
	struct ibv_wc wc;

	CHECK_EQ(ibv_post_send(loop.from, &wr, &bad), 0);
	while (ibv_poll_cq(loop.cq, 1, &wc) == 0)
		;
	return wc.status;
}

/* Shrinks or punches the file of registered memory: requests that need the lost pages fail, and only those. */
static void taken_away(bool punch)
{
	int fd = memory_file(LENGTH);
	unsigned char *at = map_shared(LENGTH, fd);
	unsigned char *own = map(LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	const enum ibv_wc_status lost[] = {IBV_WC_SUCCESS, IBV_WC_REM_ACCESS_ERR, IBV_WC_LOC_PROT_ERR};

	for (int kind = 0; kind < 3; kind++) {
		struct stat status;

		CHECK_EQ(ftruncate(fd, LENGTH), 0);
		loop_fill(at, LENGTH, 1);
		loop = loop_open();
		struct ibv_mr *mr = reg(at, LENGTH), *own_mr = reg(own, LENGTH);

		if (punch)
			CHECK_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, LENGTH / 2, LENGTH / 2), 0);
		else
			CHECK_EQ(ftruncate(fd, LENGTH / 2), 0);
		size_t gone = kind ? LENGTH / 2 + 10 : 0;

		CHECK_EQ(kind == 2 ? outcome(own_mr, 0, mr, gone, 3 * PAGE) : outcome(mr, gone, own_mr, 0, 3 * PAGE),
			 pinned ? IBV_WC_SUCCESS : lost[kind]);
		CHECK_EQ(fstat(fd, &status), 0);
		CHECK(status.st_blocks * 512 <= LENGTH / 2, "the proxy made pages");
		/* Pages that come back are pages again. */
		CHECK_EQ(ftruncate(fd, LENGTH), 0);
		loop_fill(at, LENGTH, 2);
		if (!kind)
			CHECK_EQ(outcome(mr, LENGTH / 2, own_mr, 0, LENGTH / 2), IBV_WC_SUCCESS);
		/* But not those that the card has. */
		if (pinned)
			loop_check_filled(at, LENGTH, 2);
		loop_dereg(mr);
		loop_dereg(own_mr);
	}
}

static void shrunk(void)
{
	taken_away(false);
}

static void punched(void)
{
	taken_away(true);
}

static _Atomic bool storm_ends;

/* Stands still for up to a millisecond between two calls, so that whatever takes part comes to every state of the file. */
static void *storm(void *argument)
{
	int fd = *(int *)argument;

	for (unsigned round = 0; !atomic_load(&storm_ends); round++) {
		CHECK_EQ(ftruncate(fd, PAGE), 0);
		CHECK_EQ(ftruncate(fd, LENGTH), 0);
		CHECK_EQ(fallocate(fd, 0, 0, LENGTH), 0);
		usleep(round % 4 * 300);
		CHECK_EQ(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, LENGTH / 2), 0);
		CHECK_EQ(fallocate(fd, 0, 0, LENGTH), 0);
		usleep(round % 3 * 300);
	}
	return NULL;
}

/* Requests in both directions while the file shrinks, is punched and grows all the time: each ends, one way or the other. */
static void taken_away_all_the_time(void)
{
	int fd = memory_file(LENGTH), ends[3] = {0};
	unsigned char *at = map_shared(LENGTH, fd);
	unsigned char *own = map(LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	time_t until = time(NULL) + 3;
	pthread_t thread;

	loop_close(&loop);
	CHECK_EQ(pthread_create(&thread, NULL, storm, &fd), 0);
	/* Where processors are scarce the first long request of a queue pair fails as a rule, so rounds begin with either direction. */
	for (int round = 0; time(NULL) < until || (!pinned && (!ends[0] || !ends[1] || !ends[2])); round++) {
		CHECK(time(NULL) < until + 30, "%d, %d and %d of each end", ends[0], ends[1], ends[2]);
		loop = loop_open();
		struct ibv_mr *own_mr = reg(own, LENGTH), *mr = ibv_reg_mr(loop.pd, at, LENGTH, REMOTE);
		bool works = mr;

		CHECK(mr || errno == EFAULT, "errno %d", errno);
		for (int i = round % 2; works && i < 1000; i++) {
			uint32_t length = (i + round) % 3 ? LENGTH : 8;
			enum ibv_wc_status status = i % 2 ? outcome(mr, 0, own_mr, 0, length) : outcome(own_mr, 0, mr, 0, length);

			works = status == IBV_WC_SUCCESS;
			ends[status == IBV_WC_SUCCESS	     ? 0
			     : status == IBV_WC_REM_ACCESS_ERR ? 1
							       : 2]++;
			CHECK(works || (!pinned && (status == IBV_WC_REM_ACCESS_ERR || status == IBV_WC_LOC_PROT_ERR)), "%s",
			      ibv_wc_status_str(status));
		}
		if (mr)
			loop_dereg(mr);
		loop_dereg(own_mr);
		loop_close(&loop);
	}
	atomic_store(&storm_ends, true);
	pthread_join(thread, NULL);
	printf("%d succeeded, %d lost their target, %d their source\n", ends[0], ends[1], ends[2]);
}

/* A thousand registrations of one file leave nothing behind, here or at the proxy, whose quota is less than their sum. */
static void again_and_again(void)
{
	unsigned char *at = map_shared(LENGTH, memory_file(LENGTH));
	struct ibv_mr *kept = reg(at, LENGTH);
	int before = open_descriptors();

	for (int i = 0; i < 1000; i++) {
		struct ibv_mr *mr = reg(at + i % 7 * PAGE, 5 * PAGE + i % 11);

		loop_write(&loop, kept, at + 32 * PAGE, mr, at + i % 7 * PAGE, PAGE);
		loop_dereg(mr);
	}
	CHECK_EQ(open_descriptors(), before);
	loop_dereg(kept);
}

static void huge_pages(void)
{
	enum { HUGE = 2 << 20 };
	int fd = memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);

	if (fd < 0 || ftruncate(fd, 2 * HUGE)) {
		printf("SKIPPED: this kernel has no files of huge pages\n");
		return;
	}
	unsigned char *at = mmap(NULL, 2 * HUGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (at == MAP_FAILED) {
		printf("SKIPPED: no huge pages can be had (sysctl vm.nr_hugepages)\n");
		return;
	}
	unsigned char *elsewhere = map_shared(2 * HUGE, fd);

	round_trip(at, elsewhere, 2 * HUGE);
	round_trip(at + HUGE - 100, elsewhere + HUGE - 100, 5000);
	/* One that is taken away. */
	loop = loop_open();
	unsigned char *own = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	struct ibv_mr *mr = reg(at, 2 * HUGE), *own_mr = reg(own, PAGE);

	CHECK_EQ(ftruncate(fd, HUGE), 0);
	CHECK_EQ(outcome(mr, HUGE + 1, own_mr, 0, 100), pinned ? IBV_WC_SUCCESS : IBV_WC_REM_ACCESS_ERR);
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
	{"a_memory_file", a_memory_file},
	{"a_file_with_a_name_whose_descriptor_is_closed", a_file_with_a_name_whose_descriptor_is_closed},
	{"a_file_that_another_descriptor_only_reads", a_file_that_another_descriptor_only_reads},
	{"files_that_cannot_be_had", files_that_cannot_be_had},
	{"two_processes", two_processes},
	{"only_to_be_read", only_to_be_read},
	{"files_of_other_kinds", files_of_other_kinds},
	{"shrunk", shrunk},
	{"punched", punched},
	{"taken_away_all_the_time", taken_away_all_the_time},
	{"again_and_again", again_and_again},
	{"huge_pages", huge_pages},
};

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		if (argc == 2 && !strcmp(argv[1], "list"))
			puts(cases[i].name);
		if (argc == 2 && !strcmp(argv[1], cases[i].name)) {
			pinned = getenv("PAGES_ARE_PINNED");
			loop = loop_open();
			cases[i].run();
			return 0;
		}
	}
	return argc == 2 && !strcmp(argv[1], "list") ? 0 : 2;
}
