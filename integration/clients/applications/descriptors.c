/*
 * Descriptors that the program closes, reuses or has inherited. The library writes to and closes its own, and does not
 * depend on them where the interface does not say so. See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { FILES = 16 };

/* Files of the program's own, in the places of what it has closed. */
struct own_files {
	int fd[FILES];
	struct stat made[FILES];
};

static void close_all(void)
{
	struct rlimit limit;

	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
	for (int fd = 3; fd < (int)limit.rlim_cur; fd++)
		close(fd);
}

static void open_files(struct own_files *files)
{
	for (int i = 0; i < FILES; i++) {
		files->fd[i] = memfd_create("own", MFD_CLOEXEC);
		CHECK(files->fd[i] >= 0, "%s", strerror(errno));
		CHECK_EQ(fstat(files->fd[i], &files->made[i]), 0);
	}
}

/* They are open, the same, and empty. */
static void files_untouched(const struct own_files *files)
{
	for (int i = 0; i < FILES; i++) {
		struct stat now;

		CHECK(!fstat(files->fd[i], &now), "descriptor %d, the program's own, is closed", files->fd[i]);
		CHECK(now.st_ino == files->made[i].st_ino && now.st_dev == files->made[i].st_dev,
		      "descriptor %d, the program's own, is another file", files->fd[i]);
		CHECK(now.st_size == 0, "%lld bytes in descriptor %d that the program did not write",
		      (long long)now.st_size, files->fd[i]);
	}
}

/* A region of use: what is written by the device arrives. */
static void device_works(void)
{
	struct loop loop = loop_open();
	unsigned char *at = topic_memory(2 * PAGE, 0);
	struct ibv_mr *mr = loop_reg(&loop, at, 2 * PAGE);

	memset(at, 0x5a, PAGE);
	loop_write(&loop, mr, at + PAGE, mr, at, PAGE);
	topic_all(at + PAGE, PAGE, 0x5a, "written by the device");
	loop_dereg(mr);
	loop_close(&loop);
}

static struct ibv_device **listed(int at_least)
{
	int count = -1;
	struct ibv_device **list = ibv_get_device_list(&count);

	CHECK(list && count >= at_least, "%d devices: %s", count, strerror(errno));
	return list;
}

/* Lists devices, becomes a daemon that closes all descriptors and opens files of its own, and lists again. */
static void becomes_a_daemon(void)
{
	struct own_files files;

	ibv_free_device_list(listed(1));
	pid_t child = fork();

	if (child) {
		topic_ended_well(child, "the daemon");
		return;
	}
	setsid();
	close_all();
	open_files(&files);
	struct ibv_device **list = listed(1);

	files_untouched(&files);
	CHECK(ibv_open_device(list[0]), "%s", strerror(errno));
	device_works();
	files_untouched(&files);
	_exit(0);
}

/* daemon(3), twice forked, with a device that was open before. */
static void becomes_a_daemon_with_an_open_device(void)
{
	struct own_files files;
	int report[2];
	char word = 0;
	struct ibv_pd *pd = topic_open();

	CHECK(pd);
	CHECK_EQ(pipe(report), 0);
	pid_t child = fork();

	if (child) {
		close(report[1]);
		CHECK(read(report[0], &word, 1) == 1 && word == 'y', "the daemon did not come to its end");
		topic_ended_well(child, "the daemon's parent");
		return;
	}
	if (fork())
		_exit(0);
	setsid();
	CHECK_EQ(dup2(report[1], 1), 1);
	close_all();
	open_files(&files);
	device_works();
	files_untouched(&files);
	CHECK_EQ(write(1, "y", 1), 1);
	_exit(0);
}

/* The device is chosen before the fork and opened after it. */
static void opened_by_a_child(void)
{
	struct ibv_device **list = listed(1);
	pid_t child = fork();

	if (!child) {
		struct ibv_context *context = ibv_open_device(list[0]);

		CHECK(context, "the parent's choice: %s", strerror(errno));
		CHECK(ibv_alloc_pd(context), "%s", strerror(errno));
		CHECK_EQ(ibv_close_device(context) == 0 || errno == EBUSY, 1);
		device_works();
		_exit(0);
	}
	topic_ended_well(child, "the child");
	CHECK(ibv_open_device(list[0]), "%s", strerror(errno));
	ibv_free_device_list(list);
	device_works();
}

static void closed_between_list_and_open(bool reused)
{
	struct own_files files;
	struct ibv_device **list = listed(1);

	close_all();
	if (reused)
		open_files(&files);
	struct ibv_context *context = ibv_open_device(list[0]);

	CHECK(context, "%s", strerror(errno));
	ibv_free_device_list(list);
	list = listed(1);
	CHECK(ibv_open_device(list[0]), "%s", strerror(errno));
	ibv_free_device_list(list);
	device_works();
	if (reused)
		files_untouched(&files);
}

static void closeall_0(void) { closed_between_list_and_open(false); }
static void closeall_1(void) { closed_between_list_and_open(true); }

/* A queue pair is in use, something closes all descriptors, and files are opened in their place. */
static void closed_under_a_queue_pair(void)
{
	struct own_files files;
	struct loop loop = loop_open();
	unsigned char *at = topic_memory(2 * PAGE, 1);
	struct ibv_mr *mr = loop_reg(&loop, at, 2 * PAGE);

	loop_write(&loop, mr, at + PAGE, mr, at, 64);
	/* So that the proxy sleeps and must be woken. */
	usleep(300000);
	close_all();
	open_files(&files);
	for (int i = 0; i < 3; i++) {
		(void)loop_post_write(&loop, 1, mr, mr, 64);
		usleep(100000);
		files_untouched(&files);
	}
	/* Whatever these answer, they answer, and touch nothing of the program's. */
	(void)ibv_dereg_mr(mr);
	files_untouched(&files);
	(void)ibv_destroy_qp(loop.from);
	(void)ibv_destroy_qp(loop.to);
	(void)ibv_destroy_cq(loop.cq);
	(void)ibv_close_device(loop.context);
	files_untouched(&files);
	device_works();
	files_untouched(&files);
}

static void would_block(void)
{
	struct ibv_pd *pd = topic_open();
	struct ibv_comp_channel *channel = ibv_create_comp_channel(pd->context);
	struct ibv_async_event event;
	struct ibv_cq *cq;
	void *context;

	CHECK(channel, "%s", strerror(errno));
	CHECK_EQ(fcntl(channel->fd, F_SETFL, fcntl(channel->fd, F_GETFL) | O_NONBLOCK), 0);
	CHECK_EQ(ibv_get_cq_event(channel, &cq, &context), -1);
	CHECK(errno == EAGAIN, "ibv_get_cq_event: %s", strerror(errno));
	CHECK_EQ(fcntl(pd->context->async_fd, F_SETFL, O_NONBLOCK), 0);
	CHECK_EQ(ibv_get_async_event(pd->context, &event), -1);
	CHECK(errno == EAGAIN, "ibv_get_async_event: %s", strerror(errno));
}

/* select() of descriptors that the interface gives to programs. */
static void fit_for_select(void)
{
	struct ibv_pd *pd = topic_open();
	struct ibv_comp_channel *channel = ibv_create_comp_channel(pd->context);

	CHECK(channel, "%s", strerror(errno));
	CHECK(channel->fd < FD_SETSIZE, "the completion channel is descriptor %d", channel->fd);
	CHECK(pd->context->async_fd < FD_SETSIZE, "asynchronous events are descriptor %d", pd->context->async_fd);
}

static void *pause_for_good(void *nothing)
{
	pause();
	return nothing;
}

static void written_by_the_device(struct loop *loop, unsigned char *at, struct ibv_mr *from, int value)
{
	struct ibv_mr *mr = loop_reg(loop, at, MIB);

	memset(from->addr, value, PAGE);
	loop_write(loop, mr, at + PAGE, from, from->addr, PAGE);
	topic_all(at + PAGE, PAGE, value, "what the device has written");
	loop_dereg(mr);
	topic_all(at + PAGE, PAGE, value, "what the device has written, deregistered");
}

/* A daemon that opens the device, then gives up all paths: neither /proc nor a device's node can be opened any more. */
static void confined(void)
{
	char empty[] = "/tmp/descriptors.XXXXXX";
	struct loop loop = loop_open();
	pthread_t thread;

	if (getenv("RINGFENCE_HOLD"))
		topic_unsupported("a process that cannot see its threads can neither stop them nor know what they block");
	CHECK(mkdtemp(empty), "%s", strerror(errno));
	bool has_node = access("/dev/userfaultfd", R_OK | W_OK) == 0;
	int failed = chroot(empty) ? errno : chdir("/");

	if (failed == EPERM)
		topic_unsupported("chroot: %s", strerror(failed));
	CHECK_EQ(failed, 0);
	unsigned char *from_at = topic_memory(PAGE, 0), *at = topic_memory(MIB, 1);
	struct ibv_mr *from = loop_reg(&loop, from_at, PAGE);

	written_by_the_device(&loop, at, from, 2);
	struct ibv_mr *mr = loop_reg(&loop, at, MIB);
	pid_t child = fork();

	if (!child) {
		topic_all(at + PAGE, PAGE, 2, "the child's");
		_exit(0);
	}
	topic_ended_well(child, "the child");
	loop_dereg(mr);
	if (!has_node)
		return;
	CHECK_EQ(pthread_create(&thread, NULL, pause_for_good, NULL), 0);
	written_by_the_device(&loop, at, from, 3);
}

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"daemon", becomes_a_daemon},
		{"daemon_with_an_open_device", becomes_a_daemon_with_an_open_device},
		{"daemon2", opened_by_a_child},
		{"closeall_0", closeall_0},
		{"closeall_1", closeall_1},
		{"wake", closed_under_a_queue_pair},
		{"channel", would_block},
		{"fit_for_select", fit_for_select},
		{"confined", confined},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
