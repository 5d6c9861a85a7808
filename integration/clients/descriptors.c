/*
 * Programs that close what they did not open, put files of their own in its place, fork at any time, and are interrupted.
 *
 *   descriptors list    names of the cases
 *   descriptors CASE    runs one
 *   descriptors once    one WRITE, in a process of its own
 */
#include "loop.h"
#include "descriptors.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

const char *self;

void once(void)
{
	struct loop loop = loop_open();
	unsigned char *memory = calloc(2, LENGTH);
	struct ibv_mr *mr = loop_reg(&loop, memory, 2 * LENGTH);

	memset(memory, 0x5a, LENGTH);
	loop_write(&loop, mr, memory + LENGTH, mr, memory, LENGTH);
	CHECK_EQ(memcmp(memory, memory + LENGTH, LENGTH), 0);
	loop_dereg(mr);
	loop_close(&loop);
	free(memory);
}

void ended_well(pid_t child, const char *what)
{
	int status;

	CHECK(child > 0, "%s: errno %d", what, errno);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: status %#x", what, status);
}

struct ibv_device *first_device(void)
{
	int count;
	struct ibv_device **list = ibv_get_device_list(&count), *first;

	CHECK(list && count > 0, "no device: errno %d", errno);
	first = list[0];
	ibv_free_device_list(list);
	return first;
}

void use(struct ibv_device *device)
{
	struct ibv_context *context = ibv_open_device(device);
	struct ibv_pd *pd;

	CHECK(context, "the device does not open: %s", strerror(errno));
	pd = ibv_alloc_pd(context);
	CHECK(pd, "errno %d", errno);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(context), 0);
}

/* The program's own files, which stand where the library's descriptors stood. */
static struct own {
	int number[HIGHEST];
	struct stat is[HIGHEST];
	int count;
} own;

static int open_file(void)
{
	char name[] = "/tmp/descriptors.XXXXXX";
	int file = mkstemp(name);

	CHECK(file >= 0, "errno %d", errno);
	unlink(name);
	return file;
}

/* Closes every descriptor and opens files under all numbers that were in use, and some more. */
static void replace_everything(void)
{
	int used[HIGHEST], count = 0;

	for (int number = 3; number < HIGHEST; number++)
		if (fcntl(number, F_GETFD) >= 0) {
			used[count++] = number;
			close(number);
		}
	for (int i = 0; i < 8; i++)
		own.number[own.count++] = open_file();
	for (int i = 0; i < count; i++)
		if (fcntl(used[i], F_GETFD) < 0) {
			int file = open_file();

			if (file != used[i]) {
				CHECK_EQ(dup2(file, used[i]), used[i]);
				close(file);
			}
			own.number[own.count++] = used[i];
		}
	for (int i = 0; i < own.count; i++)
		CHECK_EQ(fstat(own.number[i], &own.is[i]), 0);
}

static void everything_is_as_it_was(void)
{
	CHECK(own.count >= 8);
	for (int i = 0; i < own.count; i++) {
		struct stat now;

		CHECK_EQ(fstat(own.number[i], &now), 0);
		CHECK(now.st_dev == own.is[i].st_dev && now.st_ino == own.is[i].st_ino,
		      "descriptor %d is another file now", own.number[i]);
		CHECK_EQ(now.st_size, 0);
		CHECK_EQ(lseek(own.number[i], 0, SEEK_CUR), 0);
	}
}

static void a_device_that_was_listed_before_a_fork(void)
{
	struct ibv_device *device = first_device();
	pid_t child = fork();

	if (!child) {
		use(device);
		CHECK(first_device() == device, "the same device is another one in the child");
		once();
		_exit(0);
	}
	ended_well(child, "the child");
	use(device);
	child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
	if (!child) {
		use(device);
		_exit(0);
	}
	ended_well(child, "a child of the bare system call");
	once();
}

static void a_device_that_was_listed_before_everything_was_closed(void)
{
	struct ibv_device *device = first_device();

	replace_everything();
	use(device);
	everything_is_as_it_was();
	CHECK(first_device() == device);
	/* Not only what a program can guess. */
	for (int number = 3; number < 1024; number++)
		close(number);
	use(device);
	syscall(SYS_close_range, 3, ~0U, 0);
	use(device);
	once();
}

static void a_daemon(void)
{
	struct ibv_device *device = first_device();
	pid_t child = fork();

	if (!child) {
		setsid();
		replace_everything();
		CHECK(first_device() == device);
		everything_is_as_it_was();
		use(device);
		once();
		everything_is_as_it_was();
		_exit(0);
	}
	ended_well(child, "the daemon");
	use(device);
}

static int poll_for(struct ibv_cq *cq, struct ibv_wc *wc, int seconds)
{
	time_t end = time(NULL) + seconds;
	int n = 0;

	while (!n && time(NULL) <= end)
		n = ibv_poll_cq(cq, 1, wc);
	return n;
}

#define REFUSED(call)                                                                                                  \
	do {                                                                                                           \
		errno = 0;                                                                                             \
		CHECK(!(call), "a success");                                                                           \
		CHECK_EQ(errno, EIO);                                                                                  \
	} while (0)

/* What is left of objects whose connection is gone, or is another process's. */
static void refused(struct loop *loop, struct ibv_comp_channel *channel)
{
	struct ibv_qp_init_attr init = {.send_cq = loop->cq, .recv_cq = loop->cq, .cap = {1, 1, 1, 1, 0}, .qp_type = IBV_QPT_RC};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
	static char memory[LENGTH];
	struct ibv_cq *cq;
	void *context;

	REFUSED(ibv_alloc_pd(loop->context));
	REFUSED(ibv_create_cq(loop->context, 1, NULL, NULL, 0));
	REFUSED(ibv_create_comp_channel(loop->context));
	REFUSED(ibv_create_qp(loop->pd, &init));
	REFUSED(ibv_reg_mr(loop->pd, memory, LENGTH, IBV_ACCESS_LOCAL_WRITE));
	CHECK_EQ(ibv_modify_qp(loop->from, &attr, IBV_QP_STATE), EIO);
	CHECK_EQ(ibv_query_qp(loop->from, &attr, IBV_QP_STATE, &init), EIO);
	CHECK_EQ(ibv_destroy_qp(loop->from), EIO);
	CHECK_EQ(ibv_destroy_cq(loop->cq), EIO);
	CHECK_EQ(ibv_dealloc_pd(loop->pd), EIO);
	errno = 0;
	CHECK_EQ(ibv_get_cq_event(channel, &cq, &context), -1);
	CHECK(errno == EIO || errno == EBADF, "errno %d", errno);
	CHECK_EQ(ibv_close_device(loop->context), 0);
}

static void files_in_place_of_the_librarys_descriptors(void)
{
	struct loop loop = loop_open();
	struct ibv_comp_channel *channel = ibv_create_comp_channel(loop.context);
	struct ibv_device *device = loop.context->device;
	char *memory = mmap(NULL, 2 * LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *mr = loop_reg(&loop, memory, 2 * LENGTH);
	struct ibv_async_event event;
	struct ibv_wc wc;

	loop_write(&loop, mr, memory + LENGTH, mr, memory, 64);
	/* Until whoever serves the queues sleeps. */
	usleep(300000);
	replace_everything();
	for (int i = 0; i < 20; i++) {
		int posted = loop_post_write(&loop, i, mr, mr, 64);

		CHECK(posted == 0 || posted == EIO, "%d", posted);
		usleep(10000);
	}
	everything_is_as_it_was();
	CHECK_EQ(poll_for(loop.cq, &wc, 10), -1);
	CHECK_EQ(errno, EIO);
	CHECK_EQ(ibv_get_async_event(loop.context, &event), 0);
	CHECK_EQ(event.event_type, IBV_EVENT_DEVICE_FATAL);
	ibv_ack_async_event(&event);
	CHECK_EQ(ibv_get_async_event(loop.context, &event), -1);
	CHECK_EQ(errno, EBADF);
	refused(&loop, channel);
	everything_is_as_it_was();
	use(device);
	once();
	everything_is_as_it_was();
}

/* Those that the program knows of are left. */
static void events_of_a_device_that_is_gone(void)
{
	struct loop loop = loop_open();
	struct ibv_comp_channel *channel = ibv_create_comp_channel(loop.context);
	struct pollfd ready = {.fd = loop.context->async_fd, .events = POLLIN};
	struct ibv_async_event event;

	CHECK(channel, "errno %d", errno);
	for (int number = 3; number < HIGHEST; number++)
		if (number != loop.context->async_fd && number != channel->fd)
			close(number);
	CHECK_EQ(poll(&ready, 1, 10000), 1);
	CHECK_EQ(ibv_get_async_event(loop.context, &event), 0);
	CHECK_EQ(event.event_type, IBV_EVENT_DEVICE_FATAL);
	ibv_ack_async_event(&event);
	CHECK_EQ(ibv_get_async_event(loop.context, &event), -1);
	CHECK_EQ(errno, EIO);
	refused(&loop, channel);
	once();
}

static void a_parents_objects(void)
{
	struct loop loop = loop_open();
	struct ibv_comp_channel *channel = ibv_create_comp_channel(loop.context);
	char *memory = mmap(NULL, 2 * LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *mr = loop_reg(&loop, memory, 2 * LENGTH);
	pid_t child = fork();

	if (!child) {
		struct ibv_async_event event;
		struct ibv_wc wc;

		CHECK_EQ(loop_post_write(&loop, 1, mr, mr, 64), EIO);
		CHECK_EQ(ibv_poll_cq(loop.cq, 1, &wc), -1);
		CHECK_EQ(ibv_req_notify_cq(loop.cq, 0), EIO);
		CHECK_EQ(ibv_get_async_event(loop.context, &event), -1);
		CHECK_EQ(errno, EIO);
		CHECK_EQ(ibv_dereg_mr(mr), EIO);
		refused(&loop, channel);
		once();
		_exit(0);
	}
	ended_well(child, "the child");
	loop_write(&loop, mr, memory + LENGTH, mr, memory, 64);
	CHECK_EQ(ibv_destroy_comp_channel(channel), 0);
	loop_dereg(mr);
	loop_close(&loop);
}

/* A device's quota is its users': who is gone uses nothing, though a child of his lives on. */
static void a_child_that_outlives_its_parent(void)
{
	int ends[2];
	pid_t parent;

	CHECK_EQ(pipe(ends), 0);
	parent = fork();
	if (!parent) {
		/* As many as there may be. */
		struct ibv_context *context = ibv_open_device(first_device());

		for (int i = 0; i < 4; i++)
			CHECK(ibv_create_cq(context, 1, NULL, NULL, 0), "errno %d", errno);
		if (!fork()) {
			char byte;

			close(ends[1]);
			CHECK_EQ(read(ends[0], &byte, 1), 0);
		}
		_exit(0);
	}
	ended_well(parent, "the parent");
	for (int tries = 0;; tries++) {
		struct ibv_context *context = ibv_open_device(first_device());
		struct ibv_cq *cq = ibv_create_cq(context, 1, NULL, NULL, 0);

		if (cq) {
			CHECK_EQ(ibv_destroy_cq(cq), 0);
			CHECK_EQ(ibv_close_device(context), 0);
			break;
		}
		CHECK(errno == ENOMEM && tries < 100, "errno %d", errno);
		CHECK_EQ(ibv_close_device(context), 0);
		usleep(50000);
	}
	close(ends[1]);
}

static const struct {
	const char *name;
	void (*run)(void);
} cases[] = {
	{"a_device_that_was_listed_before_a_fork", a_device_that_was_listed_before_a_fork},
	{"a_device_that_was_listed_before_everything_was_closed", a_device_that_was_listed_before_everything_was_closed},
	{"a_daemon", a_daemon},
	{"files_in_place_of_the_librarys_descriptors", files_in_place_of_the_librarys_descriptors},
	{"events_of_a_device_that_is_gone", events_of_a_device_that_is_gone},
	{"a_parents_objects", a_parents_objects},
	{"a_child_that_outlives_its_parent", a_child_that_outlives_its_parent},
	{"descriptors_that_do_not_block", descriptors_that_do_not_block},
	{"low_numbers_are_the_programs", low_numbers_are_the_programs},
	{"a_child_has_none_of_the_librarys", a_child_has_none_of_the_librarys},
	{"few_descriptors", few_descriptors},
	{"interruptions", interruptions},
	{"cancelled_threads", cancelled_threads},
	{"an_answer_that_never_comes", an_answer_that_never_comes},
	{"children_of_every_kind", children_of_every_kind},
};

int main(int argc, char **argv)
{
	const char *name = argc == 2 ? argv[1] : "";

	self = argv[0];
	for (int number = 3; number < HIGHEST; number++)
		inherited[number] = fcntl(number, F_GETFD) >= 0;
	if (!strcmp(name, "once")) {
		once();
		return 0;
	}
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		if (!strcmp(name, "list"))
			puts(cases[i].name);
		if (!strcmp(name, cases[i].name)) {
			cases[i].run();
			return 0;
		}
	}
	return strcmp(name, "list") ? 2 : 0;
}
