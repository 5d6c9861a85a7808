/*
 * A container that is asked for little and gives much to do: large WRITEs, posted in bursts for as many seconds as are given.
 *
 *   burn SECONDS
 */
#include "topic.h"

#include <unistd.h>

enum { LENGTH = 64 * MIB, DEPTH = 60 };

int main(int argc, char **argv)
{
	double end = topic_now() + (argc > 1 ? atoi(argv[1]) : 5);
	struct loop loop = loop_open();
	unsigned char *from = topic_memory(LENGTH, 1), *to = topic_memory(LENGTH, 2);
	struct ibv_mr *source = loop_reg(&loop, from, LENGTH), *target = loop_reg(&loop, to, LENGTH);
	uint64_t posted = 0, completed = 0;
	struct ibv_wc wcs[16];

	while (topic_now() < end) {
		while (posted - completed < DEPTH && !loop_post_write(&loop, posted, target, source, LENGTH))
			posted++;
		int n = ibv_poll_cq(loop.cq, 16, wcs);

		CHECK(n >= 0);
		for (int i = 0; i < n; i++)
			CHECK_EQ(wcs[i].status, IBV_WC_SUCCESS);
		completed += n;
		if (completed == (uint64_t)n && n > 0)
			puts("burning");
		fflush(stdout);
		usleep(50000);
	}
	printf("%llu WRITEs of 64 MiB\n", (unsigned long long)completed);
	return 0;
}
