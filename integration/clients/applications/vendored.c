/* Linked to a copy of libibverbs under another SONAME, as Python's wheels bring one. See topic.h. */
#include "topic.h"

#include <string.h>

static void works(void)
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

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {{"works", works}, {NULL, NULL}};

	return topic_main(cases, argc, argv);
}
