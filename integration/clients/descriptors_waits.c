/* Cases of `descriptors`: descriptors to wait on, calls that are interrupted, cancelled or never answered, and children. */
#include "descriptors.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

void descriptors_that_do_not_block(void)
{
	struct loop loop = loop_open();
	struct ibv_comp_channel *channel = ibv_create_comp_channel(loop.context);
	struct ibv_async_event event;
	struct ibv_cq *cq;
	void *context;

	CHECK_EQ(fcntl(channel->fd, F_SETFL, fcntl(channel->fd, F_GETFL) | O_NONBLOCK), 0);
	CHECK_EQ(ibv_get_cq_event(channel, &cq, &context), -1);
	CHECK_EQ(errno, EAGAIN);
	CHECK_EQ(fcntl(loop.context->async_fd, F_SETFL, O_NONBLOCK), 0);
	CHECK_EQ(ibv_get_async_event(loop.context, &event), -1);
	CHECK_EQ(errno, EAGAIN);
	/* A copy is the same descriptor by another number. */
	int copy = fcntl(loop.context->async_fd, F_DUPFD_CLOEXEC, 40);
	CHECK(copy >= 40, "F_DUPFD_CLOEXEC: %s", strerror(errno));
	loop.context->async_fd = copy;
	CHECK_EQ(ibv_get_async_event(loop.context, &event), -1);
	CHECK_EQ(errno, EAGAIN);
	CHECK_EQ(ibv_destroy_comp_channel(channel), 0);
	loop_close(&loop);
	CHECK_EQ(fcntl(copy, F_GETFD), -1);
}

bool inherited[HIGHEST];

static int open_below(int limit)
{
	int count = 0;

	for (int number = 3; number < limit; number++)
		count += !inherited[number] && fcntl(number, F_GETFD) >= 0;
	return count;
}

/* select() knows FD_SETSIZE descriptors; those to wait on are among them, and hardly any others. */
void low_numbers_are_the_programs(void)
{
	struct rlimit limit;
	struct loop loop;
	struct ibv_comp_channel *channel;
	fd_set set;
	struct timeval now = {0, 0};

	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
	if (limit.rlim_max >= HIGHEST) {
		limit.rlim_cur = HIGHEST;
		CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
	}
	loop = loop_open();
	channel = ibv_create_comp_channel(loop.context);
	CHECK_EQ(open_below(limit.rlim_cur >= HIGHEST ? FD_SETSIZE : (int)limit.rlim_cur / 2), 2);
	CHECK(loop.context->async_fd < 16 && channel->fd < 16, "%d, %d", loop.context->async_fd, channel->fd);
	FD_ZERO(&set);
	FD_SET(loop.context->async_fd, &set);
	FD_SET(channel->fd, &set);
	CHECK_EQ(select(16, &set, NULL, NULL, &now), 0);
	for (int number = 3; number < HIGHEST; number++) {
		int flags = fcntl(number, F_GETFD);

		CHECK(inherited[number] || flags < 0 || flags & FD_CLOEXEC, "descriptor %d outlives exec", number);
	}
	CHECK_EQ(ibv_destroy_comp_channel(channel), 0);
	loop_close(&loop);
}

/* A child may be there to have fewer rights than its parent, whose memory some of these mean. */
void a_child_has_none_of_the_librarys(void)
{
	struct loop loop = loop_open();
	unsigned char *memory = calloc(2, LENGTH);
	struct ibv_mr *mr = loop_reg(&loop, memory, 2 * LENGTH);
	pid_t child;

	child = fork();
	if (!child) {
		/* What the interface gives to the program. */
		CHECK_EQ(open_below(HIGHEST), 1);
		CHECK(fcntl(loop.context->async_fd, F_GETFD) >= 0, "errno %d", errno);
		once();
		_exit(0);
	}
	ended_well(child, "the child");
	loop_write(&loop, mr, memory + LENGTH, mr, memory, LENGTH);
	loop_dereg(mr);
	loop_close(&loop);
	free(memory);
}

void few_descriptors(void)
{
	struct rlimit limit;
	struct loop loop;
	int files = 0;

	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &limit), 0);
	limit.rlim_cur = 64;
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &limit), 0);
	loop = loop_open();
	CHECK_EQ(open_below(48), 1);
	while (open("/dev/null", O_RDONLY | O_CLOEXEC) >= 0)
		files++;
	CHECK(files >= 45, "%d files", files);
	for (int number = 40; number < 48; number++)
		close(number);
	loop_close(&loop);
	once();
}

static void on_alarm(int signal)
{
	(void)signal;
}

/* Signals at any time, none of which restarts a system call. */
void interruptions(void)
{
	struct sigaction action = {.sa_handler = on_alarm};
	struct itimerval often = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
	struct ibv_context *context = ibv_open_device(first_device());
	time_t end = time(NULL) + 3;
	int rounds = 0;

	CHECK_EQ(sigaction(SIGALRM, &action, NULL), 0);
	CHECK_EQ(setitimer(ITIMER_REAL, &often, NULL), 0);
	for (; time(NULL) < end; rounds++) {
		struct ibv_cq *cq = ibv_create_cq(context, 16, NULL, NULL, 0);
		struct ibv_port_attr port;

		CHECK(cq, "round %d: errno %d", rounds, errno);
		CHECK_EQ(ibv_query_port(context, 1, &port), 0);
		CHECK_EQ(port.state, IBV_PORT_ACTIVE);
		CHECK_EQ(ibv_destroy_cq(cq), 0);
		use(context->device);
	}
	CHECK_EQ(setitimer(ITIMER_REAL, &never, NULL), 0);
	CHECK(rounds > 10, "%d rounds", rounds);
	CHECK_EQ(ibv_close_device(context), 0);
}

static struct ibv_context *shared;

static void *waits_for_events(void *argument)
{
	struct ibv_comp_channel *channel = argument;
	struct ibv_cq *cq;
	void *context;

	ibv_get_cq_event(channel, &cq, &context);
	return NULL;
}

/* Once it is to be cancelled it asks and answers to the end, whatever the calls inside wait for. */
static void *is_cancelled_already(void *argument)
{
	(void)argument;
	pthread_cancel(pthread_self());
	for (int i = 0; i < 100; i++) {
		struct ibv_cq *cq = ibv_create_cq(shared, 16, NULL, NULL, 0);

		CHECK(cq, "errno %d", errno);
		CHECK_EQ(ibv_destroy_cq(cq), 0);
	}
	pthread_testcancel();
	return NULL;
}

void cancelled_threads(void)
{
	pthread_t thread;
	void *result;

	shared = ibv_open_device(first_device());
	CHECK_EQ(pthread_create(&thread, NULL, is_cancelled_already, NULL), 0);
	CHECK_EQ(pthread_join(thread, &result), 0);
	CHECK(result == PTHREAD_CANCELED);
	for (int i = 0; i < 20; i++) {
		struct ibv_comp_channel *channel = ibv_create_comp_channel(shared);

		CHECK(channel, "errno %d", errno);
		CHECK_EQ(pthread_create(&thread, NULL, waits_for_events, channel), 0);
		usleep(1000 * (i % 4));
		CHECK_EQ(pthread_cancel(thread), 0);
		CHECK_EQ(pthread_join(thread, &result), 0);
		CHECK(result == PTHREAD_CANCELED);
		CHECK_EQ(ibv_destroy_comp_channel(channel), 0);
	}
	CHECK_EQ(ibv_close_device(shared), 0);
}

/* Somebody who listens and never answers: a program that waits for him can be ended as any other. */
void an_answer_that_never_comes(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "/tmp/descriptors.silent"};
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0), status;
	pid_t child;

	unlink(address.sun_path);
	CHECK_EQ(bind(listener, (struct sockaddr *)&address, sizeof(address)), 0);
	CHECK_EQ(listen(listener, 1), 0);
	child = fork();
	if (!child) {
		setenv("RINGFENCE_SOCKET", address.sun_path, 1);
		ibv_get_device_list(NULL);
		_exit(0);
	}
	usleep(100000);
	CHECK_EQ(kill(child, SIGTERM), 0);
	for (int tries = 0; waitpid(child, &status, WNOHANG) == 0; tries++) {
		CHECK(tries < 200, "the program cannot be ended");
		usleep(50000);
	}
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "status %#x", status);
	unlink(address.sun_path);
}

extern char **environ;

void children_of_every_kind(void)
{
	struct loop loop = loop_open();
	char *memory = mmap(NULL, 2 * LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *mr = loop_reg(&loop, memory, 2 * LENGTH);
	char *arguments[] = {(char *)self, "once", NULL}, command[4096], line[16];
	int ends[2];
	pid_t child;
	FILE *output;

	CHECK_EQ(posix_spawn(&child, self, NULL, NULL, arguments, environ), 0);
	ended_well(child, "posix_spawn");

	snprintf(command, sizeof(command), "'%s' once && echo fine", self);
	CHECK_EQ(system(command), 0);
	output = popen(command, "r");
	CHECK(output && fgets(line, sizeof(line), output), "popen");
	CHECK_EQ(strcmp(line, "fine\n"), 0);
	CHECK_EQ(pclose(output), 0);

	child = vfork();
	if (!child) {
		execv(self, arguments);
		_exit(127);
	}
	ended_well(child, "vfork");

	/* A daemon by the C library, and one by two forks; the pipe says how they ended. */
	CHECK_EQ(pipe2(ends, O_CLOEXEC), 0);
	for (int twice = 0; twice < 2; twice++) {
		child = fork();
		if (!child) {
			if (twice ? fork() != 0 : daemon(0, 1) != 0)
				_exit(0);
			once();
			CHECK_EQ(write(ends[1], "d", 1), 1);
			_exit(0);
		}
		ended_well(child, "the daemon's parent");
		CHECK_EQ(poll(&(struct pollfd){.fd = ends[0], .events = POLLIN}, 1, 20000), 1);
		CHECK_EQ(read(ends[0], line, 1), 1);
	}
	loop_write(&loop, mr, memory + LENGTH, mr, memory, 64);
	loop_dereg(mr);
	loop_close(&loop);
}
