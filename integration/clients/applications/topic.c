/* See topic.h. */
#include "topic.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>

int topic_main(const struct topic_case *cases, int argc, char **argv)
{
	bool listing = argc == 2 && !strcmp(argv[1], "list");

	setvbuf(stdout, NULL, _IOLBF, 0);
	for (; cases->name; cases++) {
		if (listing) {
			puts(cases->name);
		} else if (argc == 2 && !strcmp(argv[1], cases->name)) {
			cases->run();
			return 0;
		}
	}
	return listing ? 0 : 2;
}

struct ibv_pd *topic_open(void)
{
	int count = 0;
	struct ibv_device **list = ibv_get_device_list(&count);

	CHECK(list && count > 0, "no device: %s", strerror(errno));
	struct ibv_context *context = ibv_open_device(list[0]);

	CHECK(context, "%s", strerror(errno));
	ibv_free_device_list(list);
	struct ibv_pd *pd = ibv_alloc_pd(context);

	CHECK(pd, "%s", strerror(errno));
	return pd;
}

unsigned char *topic_memory(size_t length, int value)
{
	unsigned char *at = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED, "%s", strerror(errno));
	memset(at, value, length);
	return at;
}

struct ibv_mr *topic_register(struct ibv_pd *pd, void *at, size_t length)
{
	struct ibv_mr *mr = ibv_reg_mr(pd, at, length, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);

	CHECK(mr, "ibv_reg_mr of %zu bytes: %s", length, strerror(errno));
	return mr;
}

void topic_all(const volatile unsigned char *at, size_t length, int value, const char *what)
{
	for (size_t i = 0; i < length; i++)
		CHECK(at[i] == value, "%s: byte %zu is %#x, expected %#x", what, i, at[i], value);
}

void topic_ended_well(pid_t child, const char *what)
{
	int status;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: status %#x", what, status);
}

int topic_mappings(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	int lines = 0, c;

	CHECK(maps, "%s", strerror(errno));
	while ((c = getc(maps)) != EOF)
		lines += c == '\n';
	fclose(maps);
	return lines;
}

int topic_descriptors(void)
{
	int open = 0;

	for (int fd = 0; fd < 70000; fd++)
		open += fcntl(fd, F_GETFD) >= 0;
	return open;
}

double topic_now(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec / 1e9;
}

void topic_unsupported(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vprintf(format, arguments);
	va_end(arguments);
	putchar('\n');
	exit(UNSUPPORTED);
}
