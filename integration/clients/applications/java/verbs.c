/*
 * The native library of Verbs.java. Neither function uses the virtual machine's interface, so its headers are not needed.
 */
#include "../../loop.h"

#include <pthread.h>

static struct loop loop;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void open_once(void)
{
	loop = loop_open();
}

void Java_Verbs_move(void *environment, void *class, int64_t to, int64_t from, int32_t length);
void Java_Verbs_move(void *environment, void *class, int64_t to, int64_t from, int32_t length)
{
	(void)environment;
	(void)class;
	pthread_once(&once, open_once);
	struct ibv_mr *source = loop_reg(&loop, (void *)from, length), *target = loop_reg(&loop, (void *)to, length);

	loop_write(&loop, target, (void *)to, source, (void *)from, length);
	loop_dereg(source);
	loop_dereg(target);
}
