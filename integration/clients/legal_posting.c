/* Questions of `legal` about work requests. */
#include "legal.h"

#include <time.h>

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

void ask_posting(void)
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
