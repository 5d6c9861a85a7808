/*
 * Says what no proxy says to the proxy that listens at a path, each time as another process.
 *
 *   babble PATH COUNT
 */
#include "check.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static void babble(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
	char end;

	CHECK(strlen(path) < sizeof(address.sun_path), "%s", path);
	strcpy(address.sun_path, path);
	CHECK_EQ(connect(fd, (struct sockaddr *)&address, sizeof(address)), 0);
	/* It may be turned away at once. */
	send(fd, "{\"nonsense\":1}", 14, MSG_NOSIGNAL);
	recv(fd, &end, 1, 0);
	_exit(0);
}

int main(int argc, char **argv)
{
	int status;

	CHECK_EQ(argc, 3);
	for (int i = 0; i < atoi(argv[2]); i++) {
		pid_t child = fork();

		CHECK(child >= 0, "errno %d", errno);
		if (!child)
			babble(argv[1]);
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK_EQ(status, 0);
	}
	return 0;
}
