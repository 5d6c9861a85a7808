/* Questions of `legal` about memory regions, completion queues and the making of queue pairs. */
#include "legal.h"

#include <sys/mman.h>

void ask_registration(void)
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

void ask_queue(void)
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

struct ibv_qp_init_attr plain(void)
{
	return (struct ibv_qp_init_attr){
		.send_cq = cq, .recv_cq = cq, .cap = {16, 16, 2, 2, 16}, .qp_type = IBV_QPT_RC};
}

struct ibv_qp *create(void)
{
	struct ibv_qp_init_attr init = plain();
	struct ibv_qp *qp = ibv_create_qp(pd, &init);

	CHECK(qp, "errno %d", errno);
	return qp;
}

void ask_creation(void)
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
