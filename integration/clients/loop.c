/* See loop.h. */
#include "loop.h"

#include <errno.h>
#include <string.h>
#include <time.h>

static struct ibv_qp *create(struct loop *loop)
{
	struct ibv_qp_init_attr init = {
		.send_cq = loop->cq, .recv_cq = loop->cq, .cap = {256, 16, 4, 4, 64}, .qp_type = IBV_QPT_RC};
	struct ibv_qp *qp = ibv_create_qp(loop->pd, &init);

	CHECK(qp, "errno %d", errno);
	return qp;
}

static void bring_up(struct loop *loop, struct ibv_qp *qp, struct ibv_qp *peer)
{
	const char *index = getenv("GID_INDEX");
	struct ibv_port_attr port;
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ,
	};

	CHECK_EQ(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS), 0);
	memset(&attr, 0, sizeof(attr));
	attr.qp_state = IBV_QPS_RTR;
	attr.path_mtu = IBV_MTU_1024;
	attr.dest_qp_num = peer->qp_num;
	attr.max_dest_rd_atomic = 1;
	attr.min_rnr_timer = 12;
	attr.ah_attr.is_global = 1;
	attr.ah_attr.port_num = 1;
	attr.ah_attr.grh.hop_limit = 64;
	attr.ah_attr.grh.sgid_index = index ? atoi(index) : 0;
	CHECK_EQ(ibv_query_port(loop->context, 1, &port), 0);
	attr.ah_attr.dlid = port.lid;
	CHECK_EQ(ibv_query_gid(loop->context, 1, attr.ah_attr.grh.sgid_index, &attr.ah_attr.grh.dgid), 0);
	CHECK_EQ(ibv_modify_qp(qp, &attr,
			       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				       IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER),
		 0);
	memset(&attr, 0, sizeof(attr));
	attr.qp_state = IBV_QPS_RTS;
	attr.timeout = 14;
	attr.retry_cnt = 7;
	attr.rnr_retry = 7;
	attr.max_rd_atomic = 1;
	CHECK_EQ(ibv_modify_qp(qp, &attr,
			       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
				       IBV_QP_MAX_QP_RD_ATOMIC),
		 0);
}

struct loop loop_open(void)
{
	struct loop loop;
	int count;
	struct ibv_device **list = ibv_get_device_list(&count);

	CHECK(list && count > 0, "no device: errno %d", errno);
	loop.context = ibv_open_device(list[0]);
	CHECK(loop.context, "errno %d", errno);
	ibv_free_device_list(list);
	loop.pd = ibv_alloc_pd(loop.context);
	CHECK(loop.pd, "errno %d", errno);
	loop.cq = ibv_create_cq(loop.context, 256, NULL, NULL, 0);
	CHECK(loop.cq, "errno %d", errno);
	loop.from = create(&loop);
	loop.to = create(&loop);
	bring_up(&loop, loop.from, loop.to);
	bring_up(&loop, loop.to, loop.from);
	return loop;
}

void loop_close(struct loop *loop)
{
	CHECK_EQ(ibv_destroy_qp(loop->from), 0);
	CHECK_EQ(ibv_destroy_qp(loop->to), 0);
	CHECK_EQ(ibv_destroy_cq(loop->cq), 0);
	CHECK_EQ(ibv_dealloc_pd(loop->pd), 0);
	CHECK_EQ(ibv_close_device(loop->context), 0);
}

struct ibv_mr *loop_reg(struct loop *loop, void *at, size_t length)
{
	struct ibv_mr *mr = ibv_reg_mr(loop->pd, at, length,
				       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ);

	CHECK(mr, "ibv_reg_mr of %zu bytes at %p: %s", length, at, strerror(errno));
	return mr;
}

void loop_dereg(struct ibv_mr *mr)
{
	CHECK_EQ(ibv_dereg_mr(mr), 0);
}

static int post(struct loop *loop, uint64_t wr_id, struct ibv_mr *to, void *to_at, struct ibv_mr *from, void *from_at,
		uint32_t length)
{
	struct ibv_sge sge = {(uintptr_t)from_at, length, from->lkey};
	struct ibv_send_wr wr = {.wr_id = wr_id,
				 .sg_list = &sge,
				 .num_sge = 1,
				 .opcode = IBV_WR_RDMA_WRITE,
				 .send_flags = IBV_SEND_SIGNALED,
				 .wr.rdma = {(uintptr_t)to_at, to->rkey}},
			   *bad;

	return ibv_post_send(loop->from, &wr, &bad);
}

int loop_post_write(struct loop *loop, uint64_t wr_id, struct ibv_mr *to, struct ibv_mr *from, uint32_t length)
{
	return post(loop, wr_id, to, to->addr, from, from->addr, length);
}

void loop_write(struct loop *loop, struct ibv_mr *to, void *to_at, struct ibv_mr *from, void *from_at, uint32_t length)
{
	struct ibv_wc wc;
	time_t deadline = time(NULL) + 60;
	int n;

	CHECK_EQ(post(loop, 1, to, to_at, from, from_at, length), 0);
	while (!(n = ibv_poll_cq(loop->cq, 1, &wc)))
		CHECK(time(NULL) < deadline, "no completion in 60 s");
	CHECK_EQ(n, 1);
	CHECK(wc.status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc.status));
}

void loop_fill(unsigned char *at, size_t length, unsigned seed)
{
	for (size_t i = 0; i < length; i++)
		at[i] = (i * 131 + i / 256 + seed * 29) & 0xff;
}

void loop_check_filled(const unsigned char *at, size_t length, unsigned seed)
{
	for (size_t i = 0; i < length; i++)
		CHECK(at[i] == (unsigned char)(i * 131 + i / 256 + seed * 29), "byte %zu of %zu is %#x", i, length, at[i]);
}

bool loop_is_shared(const void *at)
{
	unsigned long from, to;
	char line[512], permissions[8];
	FILE *maps = fopen("/proc/self/maps", "r");
	bool shared = false;

	CHECK(maps);
	while (fgets(line, sizeof(line), maps)) {
		CHECK_EQ(sscanf(line, "%lx-%lx %7s", &from, &to, permissions), 3);
		if (from <= (uintptr_t)at && (uintptr_t)at < to)
			shared = permissions[3] == 's';
	}
	fclose(maps);
	return shared;
}
