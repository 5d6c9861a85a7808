/*
 * Connects a queue pair to each peer that is named, and prints for each what the device said, as an errno:
 *
 *   peers GID…     a GID as IPv6 is written; "own" for that of the port's first entry, "lid" for no GID but a LID;
 *                  "marked" for its own with service level 1 and traffic class 4, and then what the queue pair has of both
 */
#include "check.h"

#include <arpa/inet.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <string.h>

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;

static struct ibv_qp *initialised(void)
{
	struct ibv_qp_init_attr init = {.send_cq = cq, .recv_cq = cq, .cap = {4, 4, 1, 1, 0}, .qp_type = IBV_QPT_RC};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1};
	struct ibv_qp *qp = ibv_create_qp(pd, &init);

	CHECK(qp, "errno %d", errno);
	CHECK_EQ(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS), 0);
	return qp;
}

static int connect_to(const char *peer)
{
	struct ibv_qp *qp = initialised();
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = qp->qp_num,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.ah_attr = {.is_global = 1, .port_num = 1, .dlid = 1, .grh.hop_limit = 64},
	};

	if (!strcmp(peer, "marked")) {
		attr.ah_attr.sl = 1;
		attr.ah_attr.grh.traffic_class = 4;
	}
	if (!strcmp(peer, "own") || !strcmp(peer, "marked"))
		CHECK_EQ(ibv_query_gid(context, 1, 0, &attr.ah_attr.grh.dgid), 0);
	else if (!strcmp(peer, "lid"))
		attr.ah_attr.is_global = 0;
	else
		CHECK_EQ(inet_pton(AF_INET6, peer, attr.ah_attr.grh.dgid.raw), 1);
	int said = ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
						    IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	struct ibv_qp_init_attr init;

	/* What is refused has not happened. */
	CHECK_EQ(ibv_query_qp(qp, &attr, IBV_QP_STATE | IBV_QP_AV, &init), 0);
	CHECK_EQ(attr.qp_state, said ? IBV_QPS_INIT : IBV_QPS_RTR);
	if (!strcmp(peer, "marked") && !said)
		printf("sl %d, traffic class %d: ", attr.ah_attr.sl, attr.ah_attr.grh.traffic_class);
	CHECK_EQ(ibv_destroy_qp(qp), 0);
	return said;
}

int main(int argc, char **argv)
{
	struct ibv_device **list = ibv_get_device_list(NULL);

	CHECK(list && list[0], "no device: errno %d", errno);
	context = ibv_open_device(list[0]);
	CHECK(context, "errno %d", errno);
	pd = ibv_alloc_pd(context);
	cq = ibv_create_cq(context, 8, NULL, NULL, 0);
	CHECK(pd && cq, "errno %d", errno);
	for (int i = 1; i < argc; i++)
		printf("%s %d\n", argv[i], connect_to(argv[i]));
	return 0;
}
