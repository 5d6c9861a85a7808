/*
 * What the InfiniBand Architecture Specification (volume 1, chapters 9 to 11) and the manual pages of libibverbs say
 * about RC queue pairs, one case at a time.
 *
 *   semantics list                 names of the cases and how each can be run
 *   semantics CASE one             both ends in this process, one proxy
 *   semantics CASE two             the far end in a child whose proxy is at $PEER_SOCKET
 *
 * With SHARED_ARENA in the environment all memory is that of a memory file.
 */
#include "sides.h"

#include <string.h>

static const struct test_case *const all[] = {data_cases, error_cases, state_cases, event_cases};

int main(int argc, char **argv)
{
	for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++) {
		for (const struct test_case *c = all[i]; c->name; c++) {
			if (argc == 2 && !strcmp(argv[1], "list")) {
				printf("%s%s two\n", c->name, c->needs_two ? "" : " one");
			} else if (argc == 3 && !strcmp(argv[1], c->name)) {
				struct pair pair = {0};

				open_sides(&pair, !strcmp(argv[2], "two"));
				c->run(&pair);
				return 0;
			}
		}
	}
	if (argc == 2 && !strcmp(argv[1], "list"))
		return 0;
	fprintf(stderr, "usage: semantics list | semantics CASE one|two\n");
	return 2;
}
