/*
 * Uses every card that it finds, as far as it gets, and prints a line for each with what came of it; the status is zero if one could be
 * used. What it has made of it is left to whoever cleans up behind it. Linked statically, it has a libibverbs of its own, which knows
 * rxe, and in whose place nothing can be put.
 */
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <string.h>

static char memory[8192];

static const char *used(struct ibv_device *device)
{
	struct ibv_context *context = ibv_open_device(device);
	struct ibv_pd *pd = context ? ibv_alloc_pd(context) : NULL;
	struct ibv_cq *cq = pd ? ibv_create_cq(context, 4, NULL, NULL, 0) : NULL;
	struct ibv_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .cap = {4, 4, 1, 1, 0}, .qp_type = IBV_QPT_RC};

	if (!cq || !ibv_reg_mr(pd, memory, sizeof(memory), IBV_ACCESS_LOCAL_WRITE) || !ibv_create_qp(pd, &init))
		return strerror(errno);
	return "used";
}

int main(void)
{
	int count, status = 1;
	struct ibv_device **list = ibv_get_device_list(&count);

	if (!list)
		return printf("no list: %s\n", strerror(errno)), 1;
	for (int i = 0; i < count; i++) {
		const char *what = used(list[i]);

		printf("%s: %s\n", ibv_get_device_name(list[i]), what);
		if (!strcmp(what, "used"))
			status = 0;
	}
	printf("%d devices\n", count);
	return status;
}
