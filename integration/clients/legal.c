/*
 * What a device answers to every flag, mask and limit: a table, to be compared with that of the kernel's own driver.
 *
 *   legal      prints a line for each question: the question, and the answer behind a tab
 */
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <infiniband/verbs.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, PORT = 1 };

static struct ibv_context *context;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_device_attr device;
static struct ibv_port_attr port;
static int gid_index;
static union ibv_gid gid;
static unsigned char *memory;
static struct ibv_mr *mr;

static const char *name_of(int error)
{
	static char number[16];

	switch (error) {
	case 0: return "ok";
	case EINVAL: return "EINVAL";
	case EOPNOTSUPP: return "EOPNOTSUPP";
	case ENOMEM: return "ENOMEM";
	case EFAULT: return "EFAULT";
	case ENODATA: return "ENODATA";
	case ENOENT: return "ENOENT";
	case ENOSYS: return "ENOSYS";
	case EIO: return "EIO";
	case EPERM: return "EPERM";
	case ENODEV: return "ENODEV";
	case ERANGE: return "ERANGE";
	case EBUSY: return "EBUSY";
	case ENETUNREACH: return "ENETUNREACH";
	default: snprintf(number, sizeof(number), "errno %d", error); return number;
	}
}

static __attribute__((format(printf, 2, 3))) void say(const char *answer, const char *question, ...)
{
	va_list list;

	va_start(list, question);
	vprintf(question, list);
	va_end(list);
	printf("\t%s\n", answer);
	fflush(stdout);
}

/* Verbs that return an errno, and those that return null or -1 and set it. */
static int code(int result)
{
	return result < 0 ? errno : result;
}

static int made(void *object)
{
	return object ? 0 : errno;
}

/* Answers to one question about many values. */
struct answers {
	unsigned value[64];
	int answer[64], count;
};

static void add(struct answers *to, unsigned value, int answer)
{
	CHECK(to->count < 64);
	to->value[to->count] = value;
	to->answer[to->count++] = answer;
}

/* Answer by answer, the values that have it. */
static void say_all(const struct answers *all, const char *question)
{
	char text[1024] = "";
	int used = 0;

	for (int i = 0; i < all->count; i++) {
		bool said = false;

		for (int j = 0; j < i; j++)
			said |= all->answer[j] == all->answer[i];
		if (said)
			continue;
		used += snprintf(text + used, sizeof(text) - used, "%s%s", used ? "; " : "", name_of(all->answer[i]));
		for (int j = i; j < all->count; j++) {
			int last = j;

			if (all->answer[j] != all->answer[i])
				continue;
			while (last + 1 < all->count && all->answer[last + 1] == all->answer[i] &&
			       all->value[last + 1] == all->value[last] + 1)
				last++;
			used += snprintf(text + used, sizeof(text) - used, last > j ? " %u-%u" : " %u", all->value[j], all->value[last]);
			j = last;
		}
	}
	if (used)
		say(text, "%s", question);
}

static void ask_device(void)
{
	struct ibv_query_device_ex_input input = {0};
	struct ibv_device_attr_ex attr;

	say(name_of(code(ibv_query_device_ex(context, NULL, &attr))), "query_device_ex without input");
	say(name_of(code(ibv_query_device_ex(context, &input, &attr))), "query_device_ex with an empty input");
	input.comp_mask = 1;
	say(name_of(code(ibv_query_device_ex(context, &input, &attr))), "query_device_ex comp_mask 1");
}

static void ask_port(void)
{
	static const int ports[] = {0, 1, 2, 255}, indices[] = {-1, 65536};
	static const unsigned flags[] = {0, 1, 1U << 31};
	struct ibv_port_attr attr;
	struct ibv_gid_entry entry, table[1024];
	union ibv_gid found;
	__be16 key;

	for (int i = 0; i < 4; i++) {
		say(name_of(code(ibv_query_port(context, ports[i], &attr))), "query_port %d", ports[i]);
		say(name_of(code(ibv_query_gid(context, ports[i], 0, &found))), "query_gid port %d", ports[i]);
		say(name_of(code(ibv_query_gid_ex(context, ports[i], gid_index, &entry, 0))), "query_gid_ex port %d", ports[i]);
		say(name_of(code(ibv_query_pkey(context, ports[i], 0, &key))), "query_pkey port %d", ports[i]);
		say(ibv_get_pkey_index(context, ports[i], 0xffff) < 0 ? "none" : "found", "get_pkey_index port %d", ports[i]);
	}
	for (int i = 0; i < 2; i++) {
		say(name_of(code(ibv_query_gid(context, PORT, indices[i], &found))), "query_gid index %d", indices[i]);
		say(name_of(code(ibv_query_gid_ex(context, PORT, indices[i], &entry, 0))), "query_gid_ex index %d", indices[i]);
		say(name_of(code(ibv_query_pkey(context, PORT, indices[i], &key))), "query_pkey index %d", indices[i]);
	}
	say(name_of(code(ibv_query_pkey(context, PORT, port.pkey_tbl_len, &key))), "query_pkey past the table");
	say(name_of(code(ibv_query_gid(context, PORT, port.gid_tbl_len - 1, &found))), "query_gid of an empty entry");
	say(name_of(code(ibv_query_gid_ex(context, PORT, port.gid_tbl_len - 1, &entry, 0))), "query_gid_ex of an empty entry");
	say(name_of(code(ibv_query_gid(context, PORT, port.gid_tbl_len, &found))), "query_gid past the table");
	say(name_of(code(ibv_query_gid_ex(context, PORT, port.gid_tbl_len, &entry, 0))), "query_gid_ex past the table");
	for (int i = 0; i < 3; i++) {
		ssize_t n = ibv_query_gid_table(context, table, 1024, flags[i]);

		say(name_of(code(ibv_query_gid_ex(context, PORT, gid_index, &entry, flags[i]))), "query_gid_ex flags %#x", flags[i]);
		say(name_of(n < 0 ? (int)-n : 0), "query_gid_table flags %#x", flags[i]);
	}
	ssize_t none = ibv_query_gid_table(context, table, 0, 0);

	say(name_of(none < 0 ? (int)-none : 0), "query_gid_table into an empty array");
	say(ibv_get_pkey_index(context, PORT, 0xffff) == 0 ? "0" : "another", "get_pkey_index 0xffff");
	say(ibv_get_pkey_index(context, PORT, 0x1234) == -1 ? "-1" : "another", "get_pkey_index 0x1234");
}

static void ask_registration(void)
{
	unsigned char *constant = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *hole = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	static const unsigned combinations[] = {0, 1, 2, 3, 4, 6, 8, 9, 15, 0x12, 0x13, 0x31, 0x33};
	struct {
		void *at;
		size_t length;
		unsigned access;
		const char *what;
	} ranges[] = {
		{memory, 0, 1, "no bytes"},
		{NULL, 0, 1, "no bytes at null"},
		{NULL, PAGE, 1, "a page at null"},
		{memory + 1, 1, 1, "a byte"},
		{constant, PAGE, 0, "read-only memory"},
		{constant, PAGE, 4, "read-only memory, REMOTE_READ"},
		{constant, PAGE, 1, "read-only memory, LOCAL_WRITE"},
		{hole, 3 * PAGE, 1, "memory with a hole"},
		{(void *)-PAGE, 2 * PAGE, 1, "a range that wraps"},
		{(void *)0xffff800000000000, PAGE, 1, "the kernel's memory"},
	};
	struct answers alone = {.count = 0}, with_write = {.count = 0};

	munmap(hole + PAGE, PAGE);
	for (int bit = 0; bit < 32; bit++) {
		struct ibv_mr *region = ibv_reg_mr_iova2(pd, memory, PAGE, (uintptr_t)memory, 1U << bit);

		add(&alone, bit, made(region));
		if (region)
			ibv_dereg_mr(region);
		region = ibv_reg_mr_iova2(pd, memory, PAGE, (uintptr_t)memory, 1U << bit | IBV_ACCESS_LOCAL_WRITE);
		add(&with_write, bit, made(region));
		if (region)
			ibv_dereg_mr(region);
	}
	say_all(&alone, "reg_mr access, by bit");
	say_all(&with_write, "reg_mr access LOCAL_WRITE and, by bit");
	for (unsigned i = 0; i < sizeof(combinations) / sizeof(*combinations); i++) {
		struct ibv_mr *region = ibv_reg_mr(pd, memory, PAGE, combinations[i]);

		say(name_of(made(region)), "reg_mr access %#x", combinations[i]);
		if (region)
			ibv_dereg_mr(region);
	}
	for (unsigned i = 0; i < sizeof(ranges) / sizeof(*ranges); i++) {
		struct ibv_mr *region = ibv_reg_mr(pd, ranges[i].at, ranges[i].length, ranges[i].access);

		say(name_of(made(region)), "reg_mr of %s", ranges[i].what);
		if (region)
			ibv_dereg_mr(region);
	}
	static const struct {
		unsigned long offset, iova;
	} places[] = {{0, 0}, {0, PAGE}, {0, 8}, {8, 8}, {8, 0}, {8, PAGE + 16}, {0, 1UL << 63}, {0, -(unsigned long)PAGE}};

	for (unsigned i = 0; i < sizeof(places) / sizeof(*places); i++) {
		struct ibv_mr *region = ibv_reg_mr_iova(pd, memory + places[i].offset, PAGE, places[i].iova, 1);

		say(name_of(made(region)), "reg_mr_iova at offset %lu as %#lx", places[i].offset, places[i].iova);
		if (region)
			ibv_dereg_mr(region);
	}
	int flags[] = {0, 1, 2, 4, 7, 8};

	for (int i = 0; i < 6; i++) {
		int answer = ibv_rereg_mr(mr, flags[i], pd, memory, PAGE, 1);
		static char text[64];

		snprintf(text, sizeof(text), "%d %s", answer, answer ? name_of(errno) : "");
		say(text, "rereg_mr flags %d", flags[i]);
	}
	struct ibv_sge sge = {(uintptr_t)memory, PAGE, mr->lkey};

	for (int advice = 0; advice < 4; advice++)
		say(name_of(code(ibv_advise_mr(pd, advice, 0, &sge, 1))), "advise_mr %d", advice);
}

static void ask_queue(void)
{
	int most = device.max_cqe;
	int sizes[] = {-1, 0, 1, 2, 3, 1000, most, 0x7fffffff};
	const char *names[] = {"-1", "0", "1", "2", "3", "1000", "max_cqe", "the largest number"};

	for (int i = 0; i < 8; i++) {
		struct ibv_cq *queue = ibv_create_cq(context, sizes[i], &sizes, NULL, 0);

		say(name_of(made(queue)), "create_cq of %s", names[i]);
		if (queue) {
			say(queue->cqe >= sizes[i] && queue->cq_context == &sizes ? "enough" : "less", "cqe of a CQ of %s", names[i]);
			ibv_destroy_cq(queue);
		}
		say(name_of(code(ibv_resize_cq(cq, sizes[i]))), "resize_cq to %s", names[i]);
	}
	int vectors[] = {-1, 0, context->num_comp_vectors - 1, context->num_comp_vectors, 0x7fffffff};
	const char *vector_names[] = {"-1", "0", "the last", "num_comp_vectors", "the largest number"};

	for (int i = 0; i < 5; i++) {
		struct ibv_cq *queue = ibv_create_cq(context, 1, NULL, NULL, vectors[i]);

		say(name_of(made(queue)), "create_cq comp_vector %s", vector_names[i]);
		if (queue)
			ibv_destroy_cq(queue);
	}
	int solicited[] = {0, 1, 2, -1};

	for (int i = 0; i < 4; i++)
		say(name_of(code(ibv_req_notify_cq(cq, solicited[i]))), "req_notify_cq solicited_only %d", solicited[i]);
	struct ibv_wc wc;

	say(ibv_poll_cq(cq, 0, &wc) == 0 ? "0" : "another", "poll_cq for 0");
	struct ibv_modify_cq_attr moderation = {.attr_mask = IBV_CQ_ATTR_MODERATE, .moderate = {1, 1}};

	say(name_of(code(ibv_modify_cq(cq, &moderation))), "modify_cq");

	struct answers wc_flags = {.count = 0}, masks = {.count = 0}, flags = {.count = 0};

	for (int bit = 0; bit < 32; bit++) {
		struct ibv_cq_init_attr_ex init = {.cqe = 1, .wc_flags = 1UL << bit};
		struct ibv_cq_ex *queue;

		if (bit < 24) {
			queue = ibv_create_cq_ex(context, &init);
			add(&wc_flags, bit, made(queue));
			if (queue)
				ibv_destroy_cq(ibv_cq_ex_to_cq(queue));
		}
		init.wc_flags = 0;
		init.comp_mask = 1U << bit;
		queue = ibv_create_cq_ex(context, &init);
		add(&masks, bit, made(queue));
		if (queue)
			ibv_destroy_cq(ibv_cq_ex_to_cq(queue));
		init.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS;
		init.flags = 1U << bit;
		queue = ibv_create_cq_ex(context, &init);
		add(&flags, bit, made(queue));
		if (queue)
			ibv_destroy_cq(ibv_cq_ex_to_cq(queue));
	}
	say_all(&wc_flags, "create_cq_ex wc_flags, by bit");
	say_all(&masks, "create_cq_ex comp_mask, by bit");
	say_all(&flags, "create_cq_ex flags, by bit");

	struct ibv_cq_init_attr_ex init = {.cqe = 1, .wc_flags = IBV_CREATE_CQ_SUP_WC_FLAGS & 0x7f};
	struct ibv_cq_ex *queue = ibv_create_cq_ex(context, &init);
	struct ibv_poll_cq_attr poll = {0};

	say(name_of(made(queue)), "create_cq_ex with all standard flags");
	if (queue) {
		say(name_of(ibv_start_poll(queue, &poll)), "start_poll of an empty queue");
		poll.comp_mask = 1;
		say(name_of(ibv_start_poll(queue, &poll)), "start_poll comp_mask 1");
		ibv_destroy_cq(ibv_cq_ex_to_cq(queue));
	}
}

static struct ibv_qp_init_attr plain(void)
{
	return (struct ibv_qp_init_attr){
		.send_cq = cq, .recv_cq = cq, .cap = {16, 16, 2, 2, 16}, .qp_type = IBV_QPT_RC};
}

static struct ibv_qp *create(void)
{
	struct ibv_qp_init_attr init = plain();
	struct ibv_qp *qp = ibv_create_qp(pd, &init);

	CHECK(qp, "errno %d", errno);
	return qp;
}

static void ask_creation(void)
{
	static const int depths[] = {0, 1, 2, 3, -1};
	struct ibv_qp_init_attr init;
	struct ibv_qp *qp;

	for (int which = 0; which < 5; which++)
		for (int i = 0; i < 5; i++) {
			unsigned value = depths[i] < 0 ? 0x7fffffff : depths[i];
			const char *fields[] = {"max_send_wr", "max_recv_wr", "max_send_sge", "max_recv_sge", "max_inline_data"};

			init = plain();
			((uint32_t *)&init.cap)[which] = value;
			qp = ibv_create_qp(pd, &init);
			say(name_of(made(qp)), "create_qp %s %#x", fields[which], value);
			if (qp) {
				say(((uint32_t *)&init.cap)[which] >= value ? "enough" : "less", "granted for %s %u", fields[which],
				    value);
				ibv_destroy_qp(qp);
			}
		}
	const struct {
		const char *name;
		struct ibv_qp_cap cap;
	} limits[] = {
		{"nothing", {0, 0, 0, 0, 0}},
		{"more than max_qp_wr to send", {device.max_qp_wr + 1, 1, 1, 1, 0}},
		{"more than max_qp_wr to receive", {1, device.max_qp_wr + 1, 1, 1, 0}},
		{"max_sge", {1, 1, device.max_sge, device.max_sge, 0}},
		{"more than max_sge to send", {1, 1, device.max_sge + 1, 1, 0}},
		{"more than max_sge to receive", {1, 1, 1, device.max_sge + 1, 0}},
	};

	for (unsigned i = 0; i < sizeof(limits) / sizeof(*limits); i++) {
		init = plain();
		init.cap = limits[i].cap;
		qp = ibv_create_qp(pd, &init);
		say(name_of(made(qp)), "create_qp for %s", limits[i].name);
		if (qp)
			ibv_destroy_qp(qp);
	}
	static const int signals[] = {0, 1, 2, -1, 256};

	for (int i = 0; i < 5; i++) {
		init = plain();
		init.sq_sig_all = signals[i];
		init.qp_context = &init;
		qp = ibv_create_qp(pd, &init);
		say(name_of(made(qp)), "create_qp sq_sig_all %d", signals[i]);
		if (qp) {
			struct ibv_qp_attr attr;
			struct ibv_qp_init_attr queried;

			CHECK_EQ(ibv_query_qp(qp, &attr, IBV_QP_STATE, &queried), 0);
			say(queried.sq_sig_all ? "set" : "not set", "query_qp sq_sig_all after %d", signals[i]);
			ibv_destroy_qp(qp);
		}
	}
	static const int types[] = {0, 1, IBV_QPT_UC, IBV_QPT_UD, 5, 6, 7, IBV_QPT_RAW_PACKET, IBV_QPT_XRC_RECV, IBV_QPT_DRIVER, 0x1000};

	for (unsigned i = 0; i < sizeof(types) / sizeof(*types); i++) {
		init = plain();
		init.qp_type = types[i];
		qp = ibv_create_qp(pd, &init);
		say(name_of(made(qp)), "create_qp qp_type %#x", types[i]);
		if (qp)
			ibv_destroy_qp(qp);
	}
	struct answers masks = {.count = 0}, flags = {.count = 0}, ops = {.count = 0};

	for (int bit = 0; bit < 32; bit++) {
		struct ibv_qp_init_attr_ex extended = {
			.send_cq = cq, .recv_cq = cq, .cap = {16, 16, 2, 2, 16}, .qp_type = IBV_QPT_RC, .pd = pd};

		extended.comp_mask = IBV_QP_INIT_ATTR_PD | 1U << bit;
		/* Some of these name objects that are not there. */
		if (1U << bit != IBV_QP_INIT_ATTR_XRCD && 1U << bit != IBV_QP_INIT_ATTR_IND_TABLE) {
			qp = ibv_create_qp_ex(context, &extended);
			add(&masks, bit, made(qp));
			if (qp)
				ibv_destroy_qp(qp);
		}
		extended.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS;
		extended.create_flags = 1U << bit;
		qp = ibv_create_qp_ex(context, &extended);
		add(&flags, bit, made(qp));
		if (qp)
			ibv_destroy_qp(qp);
		if (bit < 16) {
			extended.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
			extended.send_ops_flags = 1UL << bit;
			qp = ibv_create_qp_ex(context, &extended);
			add(&ops, bit, made(qp));
			if (qp)
				ibv_destroy_qp(qp);
		}
	}
	say_all(&masks, "create_qp_ex comp_mask, by bit");
	say_all(&flags, "create_qp_ex create_flags, by bit");
	say_all(&ops, "create_qp_ex send_ops_flags, by bit");
}

static const char *const state_names[] = {"RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR"};

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

/* A queue pair, connected to itself, in that state; SQE is not to be had. */
static struct ibv_qp *in_state(enum ibv_qp_state state)
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

static void ask_transitions(void)
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

static void ask_values(void)
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

static void ask_query(void)
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

static const char *wait_for(uint64_t number)
{
	struct ibv_wc wc;
	time_t end = time(NULL) + 4;

	while (time(NULL) < end)
		if (ibv_poll_cq(cq, 1, &wc) == 1 && wc.wr_id == number)
			return ibv_wc_status_str(wc.status);
	return "nothing";
}

static void drain(void)
{
	struct ibv_wc wc;

	while (ibv_poll_cq(cq, 1, &wc) > 0)
		;
}

static struct ibv_send_wr request(struct ibv_sge *sge)
{
	*sge = (struct ibv_sge){(uintptr_t)memory, 8, mr->lkey};
	return (struct ibv_send_wr){
		.wr_id = 7,
		.sg_list = sge,
		.num_sge = 1,
		.opcode = IBV_WR_RDMA_WRITE,
		.send_flags = IBV_SEND_SIGNALED,
		.wr.rdma = {(uintptr_t)memory + PAGE, mr->rkey},
	};
}

static void post(struct ibv_send_wr *wr, const char *question, long value)
{
	struct ibv_qp *qp = in_state(IBV_QPS_RTS);
	struct ibv_sge sge = {(uintptr_t)memory + 2 * PAGE, PAGE, mr->lkey};
	struct ibv_recv_wr receive = {.wr_id = 8, .sg_list = &sge, .num_sge = 1}, *bad_receive;
	struct ibv_send_wr *bad = NULL;
	int answer;

	CHECK_EQ(ibv_post_recv(qp, &receive, &bad_receive), 0);
	answer = code(ibv_post_send(qp, wr, &bad));
	if (answer)
		say(name_of(answer), "post_send %s %ld", question, value);
	else
		say(wait_for(wr->wr_id), "post_send %s %ld", question, value);
	ibv_destroy_qp(qp);
	drain();
}

static void ask_posting(void)
{
	static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_SQD, IBV_QPS_ERR};
	struct ibv_sge sge, list[64];
	struct ibv_send_wr wr, *bad;
	struct ibv_recv_wr receive, *bad_receive;

	for (int i = 0; i < 5; i++) {
		struct ibv_qp *qp = in_state(states[i]);

		wr = request(&sge);
		say(name_of(code(ibv_post_send(qp, &wr, &bad))), "post_send in %s", state_names[states[i]]);
		receive = (struct ibv_recv_wr){.wr_id = 9};
		say(name_of(code(ibv_post_recv(qp, &receive, &bad_receive))), "post_recv in %s", state_names[states[i]]);
		ibv_destroy_qp(qp);
		drain();
	}
	for (int bit = 0; bit < 8; bit++) {
		wr = request(&sge);
		wr.send_flags |= 1 << bit;
		post(&wr, "WRITE with the flag of bit", bit);
		wr = request(&sge);
		wr.opcode = IBV_WR_SEND;
		wr.send_flags |= 1 << bit;
		post(&wr, "SEND with the flag of bit", bit);
	}
	for (int opcode = 0; opcode < 7; opcode++) {
		wr = request(&sge);
		wr.opcode = opcode;
		if (opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
			wr.wr.atomic.remote_addr = (uintptr_t)memory + PAGE;
			wr.wr.atomic.rkey = mr->rkey;
		}
		post(&wr, "opcode", opcode);
		wr.num_sge = 0;
		post(&wr, "without elements, opcode", opcode);
		wr.num_sge = 1;
		sge.length = 0;
		post(&wr, "with an empty element, opcode", opcode);
	}
	for (int i = 0; i < 64; i++)
		list[i] = (struct ibv_sge){(uintptr_t)memory, i == 1 ? 0 : 4, i == 1 ? 0xdead : mr->lkey};
	static const int counts[] = {-1, 0, 1, 2, 3, 40};

	for (int i = 0; i < 6; i++) {
		wr = request(&sge);
		wr.sg_list = list;
		wr.num_sge = counts[i];
		/* The kernel's library copies as many as it is told; -1 crashes it. */
		if (counts[i] >= 0)
			post(&wr, "WRITE of elements", counts[i]);
		if (counts[i] >= 0) {
			struct ibv_qp *qp = in_state(IBV_QPS_INIT);

			receive = (struct ibv_recv_wr){.wr_id = 9, .sg_list = list, .num_sge = counts[i]};
			say(name_of(code(ibv_post_recv(qp, &receive, &bad_receive))), "post_recv of %d elements", counts[i]);
			ibv_destroy_qp(qp);
		}
	}
	wr = request(&sge);
	wr.send_flags |= IBV_SEND_INLINE;
	sge.lkey = 0xdead;
	post(&wr, "inline with a wrong key", 0);
	wr.num_sge = 0;
	post(&wr, "inline of nothing", 0);
	wr.num_sge = 1;
	sge.length = PAGE;
	post(&wr, "inline that is too long", PAGE);
	wr = request(&sge);
	wr.wr.rdma.remote_addr = 0;
	wr.wr.rdma.rkey = 0xdead;
	sge.length = 0;
	post(&wr, "WRITE of nothing to nowhere", 0);
	wr = request(&sge);
	wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD;
	wr.wr.atomic.remote_addr = (uintptr_t)memory + PAGE;
	wr.wr.atomic.rkey = mr->rkey;
	sge.length = 16;
	post(&wr, "an atomic into more than 8 bytes", 16);
}

static void ask_others(void)
{
	struct ibv_td_init_attr td = {0};
	struct ibv_td *domain = ibv_alloc_td(context, &td);
	struct ibv_parent_domain_init_attr parent = {.pd = pd};
	struct ibv_xrcd_init_attr xrcd = {.comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = -1, .oflags = O_CREAT};
	struct ibv_alloc_dm_attr dm = {.length = 64};
	struct ibv_values_ex values = {.comp_mask = IBV_VALUES_MASK_RAW_CLOCK};
	struct ibv_ah_attr ah = {.port_num = PORT, .is_global = 1, .grh = {.hop_limit = 64, .sgid_index = gid_index, .dgid = gid}};
	struct ibv_srq_init_attr srq = {.attr = {16, 1, 0}};

	say(name_of(made(domain)), "alloc_td");
	say(name_of(made(ibv_alloc_parent_domain(context, &parent))), "alloc_parent_domain");
	say(name_of(made(ibv_open_xrcd(context, &xrcd))), "open_xrcd");
	say(name_of(made(ibv_alloc_dm(context, &dm))), "alloc_dm");
	say(name_of(code(ibv_query_rt_values_ex(context, &values))), "query_rt_values_ex");
	say(name_of(made(ibv_alloc_mw(pd, IBV_MW_TYPE_1))), "alloc_mw of type 1");
	say(name_of(made(ibv_alloc_mw(pd, IBV_MW_TYPE_2))), "alloc_mw of type 2");
	say(name_of(made(ibv_create_ah(pd, &ah))), "create_ah");
	say(name_of(made(ibv_create_srq(pd, &srq))), "create_srq");
}

static void ask_names(void)
{
	for (int number = -1; number < 9; number++)
		say(ibv_node_type_str(number), "node_type_str %d", number);
	for (int number = -1; number < 8; number++)
		say(ibv_port_state_str(number), "port_state_str %d", number);
	for (int number = -1; number < 22; number++)
		say(ibv_event_type_str(number), "event_type_str %d", number);
	for (int number = -1; number < 26; number++)
		say(ibv_wc_status_str(number), "wc_status_str %d", number);
	for (int rate = -1; rate < 27; rate++) {
		char text[64];

		snprintf(text, sizeof(text), "%d %d", ibv_rate_to_mult(rate), ibv_rate_to_mbps(rate));
		say(text, "rate_to_mult, rate_to_mbps %d", rate);
	}
	static const int numbers[] = {-1, 0, 1, 2, 3, 4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 160, 240, 320, 480, 500};

	for (unsigned i = 0; i < sizeof(numbers) / sizeof(*numbers); i++) {
		char text[64];

		snprintf(text, sizeof(text), "%d %d", mult_to_ibv_rate(numbers[i]), mbps_to_ibv_rate(numbers[i] * 2500));
		say(text, "mult_to_ibv_rate, mbps_to_ibv_rate %d", numbers[i]);
	}
}

int main(void)
{
	const char *index = getenv("GID_INDEX");
	int count;
	struct ibv_device **devices = ibv_get_device_list(&count);

	CHECK(devices && count > 0, "no device: errno %d", errno);
	gid_index = index ? atoi(index) : 0;
	context = ibv_open_device(devices[0]);
	CHECK(context, "errno %d", errno);
	ibv_free_device_list(devices);
	CHECK_EQ(ibv_query_device(context, &device), 0);
	CHECK_EQ(ibv_query_port(context, PORT, &port), 0);
	CHECK_EQ(ibv_query_gid(context, PORT, gid_index, &gid), 0);
	pd = ibv_alloc_pd(context);
	cq = ibv_create_cq(context, 256, NULL, NULL, 0);
	CHECK(pd && cq, "errno %d", errno);
	memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(memory != MAP_FAILED);
	mr = ibv_reg_mr(pd, memory, 4 * PAGE,
			IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC);
	CHECK(mr, "errno %d", errno);
	ask_device();
	ask_port();
	ask_registration();
	ask_queue();
	ask_creation();
	ask_transitions();
	ask_values();
	ask_query();
	ask_posting();
	ask_others();
	ask_names();
	return 0;
}
