/* Joining queue pairs, and the requests that travel between them. */
#include "sides.h"

const struct link_options link_defaults = {
	.timeout = 14,
	.retries = 7,
	.rnr_retries = 7,
	.rnr_timer = 1,
	.access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
	.capacity = {.send_wr = 64, .recv_wr = 64, .sges = 4, .inline_bytes = 128},
};

void open_sides(struct pair *pair, bool two)
{
	/* The child first: it must not inherit a parent that uses verbs already. */
	pair->b = two ? side_in_child(getenv("PEER_SOCKET")) : NULL;
	pair->a = side_here();
	if (!two)
		pair->b = side_here();
}

int to_init(struct side *side, int qp, int access)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = access};

	return side_modify(side, qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

int to_rtr(struct side *side, int qp, struct side *peer, int peer_qp, struct link_options options)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = side_qp_num(peer, peer_qp),
		.rq_psn = 0x123456,
		.max_dest_rd_atomic = 4,
		.min_rnr_timer = options.rnr_timer,
		.ah_attr = {.is_global = 1, .port_num = 1, .grh = {.hop_limit = 64}},
	};

	attr.ah_attr.grh.dgid = side_gid(peer, &attr.ah_attr.dlid);
	return side_modify(side, qp, &attr,
			   IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				   IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

int to_rts(struct side *side, int qp, struct link_options options)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTS,
		.timeout = options.timeout,
		.retry_cnt = options.retries,
		.rnr_retry = options.rnr_retries,
		.sq_psn = 0x123456,
		.max_rd_atomic = 4,
	};

	return side_modify(side, qp, &attr,
			   IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
				   IBV_QP_MAX_QP_RD_ATOMIC);
}

int to_state(struct side *side, int qp, enum ibv_qp_state state)
{
	struct ibv_qp_attr attr = {.qp_state = state};

	return side_modify(side, qp, &attr, IBV_QP_STATE);
}

void join(struct side *a, int qa, struct side *b, int qb, struct link_options options)
{
	CHECK_EQ(to_init(a, qa, options.access), 0);
	CHECK_EQ(to_init(b, qb, options.access), 0);
	CHECK_EQ(to_rtr(a, qa, b, qb, options), 0);
	CHECK_EQ(to_rtr(b, qb, a, qa, options), 0);
	CHECK_EQ(to_rts(a, qa, options), 0);
	CHECK_EQ(to_rts(b, qb, options), 0);
}

void connect_pair(struct pair *pair, struct link_options options)
{
	pair->qa = side_qp(pair->a, options.capacity);
	pair->qb = side_qp(pair->b, options.capacity);
	join(pair->a, pair->qa, pair->b, pair->qb, options);
}

struct send rdma(enum ibv_wr_opcode opcode, uint64_t wr_id, struct region local, uint64_t local_offset, uint32_t length,
		 struct region remote, uint64_t remote_offset)
{
	struct send send = message(wr_id, local, local_offset, length);

	send.opcode = opcode;
	send.remote_addr = remote.addr + remote_offset;
	send.rkey = remote.rkey;
	return send;
}

struct send message(uint64_t wr_id, struct region local, uint64_t offset, uint32_t length)
{
	struct send send = {.wr_id = wr_id, .opcode = IBV_WR_SEND, .flags = IBV_SEND_SIGNALED, .sges = 1};

	send.sge[0] = (struct ibv_sge){local.addr + offset, length, local.lkey};
	return send;
}
