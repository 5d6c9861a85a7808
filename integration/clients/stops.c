#include "stops.h"

#include "check.h"

#include <dirent.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

int64_t now_us(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

pid_t pid_of(const char *name)
{
	const char *value = getenv(name);

	CHECK(value, "%s is not set", name);
	return atoi(value);
}

/* The state of a thread: 'T' if it is stopped. */
static char state_of(pid_t pid, pid_t thread)
{
	char path[64], line[512], *end;
	FILE *file;

	snprintf(path, sizeof path, "/proc/%d/task/%d/stat", pid, thread);
	file = fopen(path, "r");
	if (!file)
		return 0;
	end = fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
	fclose(file);
	return end ? end[2] : 0;
}

pid_t worker_of(pid_t pid)
{
	char path[64], name[32];
	pid_t found = 0;
	DIR *tasks;

	snprintf(path, sizeof path, "/proc/%d/task", pid);
	tasks = opendir(path);
	CHECK(tasks, "errno %d", errno);
	for (struct dirent *entry; !found && (entry = readdir(tasks));) {
		snprintf(path, sizeof path, "/proc/%d/task/%.16s/comm", pid, entry->d_name);
		FILE *file = fopen(path, "r");

		if (!file)
			continue;
		if (fgets(name, sizeof name, file) && !strcmp(name, "worker\n"))
			found = atoi(entry->d_name);
		fclose(file);
	}
	closedir(tasks);
	CHECK(found, "no worker");
	return found;
}

bool is_stopped(pid_t pid, int ms)
{
	pid_t worker = worker_of(pid);

	for (int64_t end = now_us() + 1000 * (int64_t)ms; state_of(pid, worker) != 'T'; usleep(50))
		if (now_us() > end)
			return false;
	return true;
}

void stop(pid_t pid)
{
	CHECK(!kill(pid, SIGSTOP), "errno %d", errno);
	CHECK(is_stopped(pid, 10000), "it does not stop");
}

void go_on(pid_t pid)
{
	CHECK(!kill(pid, SIGCONT), "errno %d", errno);
}
