/* Questions of `legal` about the states of queue pairs, and what changes them. */
#include "legal.h"

#include <unistd.h>

const char *const state_names[] = {"RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"};

enum {
	TO_INIT = IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS,
	TO_RTR = IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
	TO_RTS = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC,
};

static struct ibv_qp_attr attributes(struct ibv_qp *qp)
{
	struct ibv_qp_attr attr = {
		.port_num = PORT,
		.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = qp->qp_num,
		.max_dest_rd_atomic = 1,
		.min_rnr_timer = 12,
		.timeout = 14,
		.retry_cnt = 3,
		.rnr_retry = 3,
		.max_rd_atomic = 1,
		.ah_attr = {.is_global = 1, .port_num = PORT, .grh = {.hop_limit = 64, .sgid_index = gid_index, .dgid = gid}},
		.alt_ah_attr = {.is_global = 1, .port_num = PORT, .grh = {.hop_limit = 64, .sgid_index = gid_index, .dgid = gid}},
		.alt_port_num = PORT,
		.alt_timeout = 14,
		.cap = {16, 16, 2, 2, 16},
	};

	attr.ah_attr.dlid = attr.alt_ah_attr.dlid = port.lid;
	return attr;
}

static int needed(enum ibv_qp_state to)
{
	switch (to) {
	case IBV_QPS_INIT: return IBV_QP_STATE | TO_INIT;
	case IBV_QPS_RTR: return IBV_QP_STATE | TO_RTR;
	case IBV_QPS_RTS: return IBV_QP_STATE | TO_RTS;
	default: return IBV_QP_STATE;
	}
}

static int move(struct ibv_qp *qp, enum ibv_qp_state to, int mask)
{
	struct ibv_qp_attr attr = attributes(qp);

	attr.qp_state = to;
	attr.cur_qp_state = qp->state;
	return code(ibv_modify_qp(qp, &attr, mask));
}

struct ibv_qp *in_state(enum ibv_qp_state state)
{
	static const enum ibv_qp_state way[] = {IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD};
	struct ibv_qp *qp = create();

	if (state == IBV_QPS_ERR) {
		CHECK_EQ(move(qp, IBV_QPS_INIT, needed(IBV_QPS_INIT)), 0);
		CHECK_EQ(move(qp, IBV_QPS_ERR, IBV_QP_STATE), 0);
		return qp;
	}
	for (int i = 0; i < 4 && qp->state != state && state != IBV_QPS_RESET; i++)
		CHECK_EQ(move(qp, way[i], needed(way[i])), 0);
	CHECK_EQ(qp->state, state);
	/* What is drained is so in a moment. */
	if (state == IBV_QPS_SQD)
		usleep(20000);
	return qp;
}

void ask_transitions(void)
{
	static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_ERR};
	static const struct {
		enum ibv_qp_state from, to;
		int needed;
	} changes[] = {
		{IBV_QPS_RESET, IBV_QPS_INIT, TO_INIT}, {IBV_QPS_INIT, IBV_QPS_INIT, 0}, {IBV_QPS_INIT, IBV_QPS_RTR, TO_RTR},
		{IBV_QPS_RTR, IBV_QPS_RTS, TO_RTS},	{IBV_QPS_RTS, IBV_QPS_RTS, 0},	 {IBV_QPS_RTS, IBV_QPS_SQD, 0},
		{IBV_QPS_SQD, IBV_QPS_SQD, 0},		{IBV_QPS_SQD, IBV_QPS_RTS, 0},	 {IBV_QPS_RTS, IBV_QPS_ERR, 0},
		{IBV_QPS_ERR, IBV_QPS_RESET, 0},	{IBV_QPS_RESET, IBV_QPS_RESET, 0}, {IBV_QPS_INIT, IBV_QPS_RESET, 0},
	};

	for (int from = 0; from < 6; from++)
		for (int to = 0; to < 7; to++) {
			struct ibv_qp *qp = in_state(states[from]);
			int mask = states[from] == (enum ibv_qp_state)to || (from == 4 && to == 3) ? IBV_QP_STATE : needed(to);

			say(name_of(move(qp, to, mask)), "modify_qp %s to %s", state_names[states[from]], state_names[to]);
			ibv_destroy_qp(qp);
		}
	for (unsigned i = 0; i < sizeof(changes) / sizeof(*changes); i++) {
		struct answers more = {.count = 0}, fewer = {.count = 0};
		char question[64];

		for (int bit = 0; bit < 32; bit++) {
			struct ibv_qp *qp;

			if (bit && !(changes[i].needed & 1U << bit)) {
				qp = in_state(changes[i].from);
				add(&more, bit, move(qp, changes[i].to, IBV_QP_STATE | changes[i].needed | 1U << bit));
				ibv_destroy_qp(qp);
			} else if (bit) {
				qp = in_state(changes[i].from);
				add(&fewer, bit, move(qp, changes[i].to, IBV_QP_STATE | (changes[i].needed & ~(1U << bit))));
				ibv_destroy_qp(qp);
			}
		}
		snprintf(question, sizeof(question), "modify_qp %s to %s with, by bit", state_names[changes[i].from], state_names[changes[i].to]);
		say_all(&more, question);
		snprintf(question, sizeof(question), "modify_qp %s to %s without, by bit", state_names[changes[i].from], state_names[changes[i].to]);
		say_all(&fewer, question);
	}
	struct answers without_state = {.count = 0};

	for (int bit = 0; bit < 32; bit++) {
		struct ibv_qp *qp = in_state(IBV_QPS_RTS);

		add(&without_state, bit, move(qp, IBV_QPS_RTS, 1U << bit));
		ibv_destroy_qp(qp);
	}
	say_all(&without_state, "modify_qp RTS, only, by bit");
}

/* One attribute has each of these values while the queue pair goes from one state to another. */
#define ASK(from, to, more, field, ...)                                                                                \
	do {                                                                                                           \
		static const unsigned values_[] = {__VA_ARGS__};                                                       \
		struct answers answers_ = {.count = 0};                                                                \
                                                                                                                       \
		for (unsigned i_ = 0; i_ < sizeof(values_) / sizeof(*values_); i_++) {                                 \
			struct ibv_qp *qp_ = in_state(from);                                                           \
			struct ibv_qp_attr attr_ = attributes(qp_);                                                    \
			int mask_ = ((from) == (to) ? IBV_QP_STATE : needed(to)) | (more);                             \
                                                                                                                       \
			attr_.qp_state = to;                                                                           \
			attr_.cur_qp_state = from;                                                                     \
			attr_.field = values_[i_];                                                                     \
			add(&answers_, values_[i_], code(ibv_modify_qp(qp_, &attr_, mask_)));                          \
			ibv_destroy_qp(qp_);                                                                           \
		}                                                                                                      \
		say_all(&answers_, "modify_qp " #from " to " #to " " #field);                                          \
	} while (0)

#define BYTES 0, 1, 2, 3, 4, 5, 6, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 129, 255

void ask_values(void)
{
	struct answers access = {.count = 0}, changed = {.count = 0};
	unsigned lost = 0;

	for (int bit = 0; bit < 32; bit++) {
		struct ibv_qp *qp = in_state(IBV_QPS_RESET);
		struct ibv_qp_attr attr = attributes(qp), queried;
		struct ibv_qp_init_attr init;

		attr.qp_state = IBV_QPS_INIT;
		attr.qp_access_flags = 1U << bit;
		add(&access, bit, code(ibv_modify_qp(qp, &attr, needed(IBV_QPS_INIT))));
		if (!access.answer[access.count - 1] && !ibv_query_qp(qp, &queried, IBV_QP_ACCESS_FLAGS, &init) &&
		    queried.qp_access_flags != 1U << bit)
			lost |= 1U << bit;
		ibv_destroy_qp(qp);
		qp = in_state(IBV_QPS_RTS);
		attr.qp_state = IBV_QPS_RTS;
		add(&changed, bit, code(ibv_modify_qp(qp, &attr, IBV_QP_STATE | IBV_QP_ACCESS_FLAGS)));
		ibv_destroy_qp(qp);
	}
	say_all(&access, "modify_qp qp_access_flags, by bit");
	say_all(&changed, "modify_qp qp_access_flags in RTS, by bit");
	char text[16];

	snprintf(text, sizeof(text), "%#x", lost);
	say(text, "query_qp does not show of qp_access_flags");
	ASK(IBV_QPS_RESET, IBV_QPS_INIT, 0, port_num, BYTES);
	ASK(IBV_QPS_RESET, IBV_QPS_INIT, 0, pkey_index, BYTES, 65535);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, path_mtu, BYTES, 0x7fffffff, 0xffffffff);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, min_rnr_timer, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, max_dest_rd_atomic, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, dest_qp_num, 0, 1, 0xffffff, 0x1000000, 0xffffffff);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, rq_psn, 0, 0xffffff, 0x1000000, 0xffffffff);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.port_num, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.sl, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.src_path_bits, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.static_rate, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.is_global, 0, 1, 2, 255);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.grh.hop_limit, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.grh.traffic_class, BYTES);
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.grh.flow_label, 0, 0xfffff, 0x100000, 0xffffffff);
	/* An entry that is empty. */
	ASK(IBV_QPS_INIT, IBV_QPS_RTR, 0, ah_attr.grh.sgid_index, 60);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, 0, timeout, BYTES);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, 0, retry_cnt, BYTES);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, 0, rnr_retry, BYTES);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, 0, max_rd_atomic, BYTES);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, 0, sq_psn, 0, 0xffffff, 0x1000000, 0xffffffff);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, IBV_QP_PATH_MIG_STATE, path_mig_state, 0, 1, 2, 3, 255);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, IBV_QP_ALT_PATH, alt_port_num, 0, 1, 2);
	ASK(IBV_QPS_RTR, IBV_QPS_RTS, IBV_QP_ALT_PATH, alt_timeout, 0, 31, 32);
	ASK(IBV_QPS_RTS, IBV_QPS_SQD, IBV_QP_EN_SQD_ASYNC_NOTIFY, en_sqd_async_notify, 0, 1, 2, 255);
	ASK(IBV_QPS_RTS, IBV_QPS_RTS, IBV_QP_CUR_STATE, cur_qp_state, 0, 1, 2, 3, 4, 5, 6, 7, 255);
	ASK(IBV_QPS_RESET, (enum ibv_qp_state)7, 0, port_num, 1);
	ASK(IBV_QPS_RESET, (enum ibv_qp_state)255, 0, port_num, 1);
}

void ask_query(void)
{
	struct ibv_qp *qp = in_state(IBV_QPS_RTS);
	struct answers masks = {.count = 0};

	for (int bit = 0; bit < 32; bit++) {
		struct ibv_qp_attr attr;
		struct ibv_qp_init_attr init;

		add(&masks, bit, code(ibv_query_qp(qp, &attr, 1U << bit, &init)));
	}
	say_all(&masks, "query_qp, by bit");
	ibv_destroy_qp(qp);
}
