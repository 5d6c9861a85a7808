/* See sides.h. Every call becomes a request that `serve` carries out here or in the child. */
#include "sides.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_QPS = 32, MAX_MRS = 64, CQ_DEPTH = 1024 };

enum op {
	OPEN,
	REG,
	DEREG,
	QP,
	QP_NUM,
	MODIFY,
	STATE,
	DESTROY_QP,
	GID,
	POST,
	RECV,
	POLL,
	NOTIFY,
	EVENT,
	ASYNC,
	FILL,
	DIFFERS,
	HOLDS,
	PEEK,
	POKE,
};

struct request {
	enum op op;
	int index, mask, count, ms;
	uint64_t offset, length, value;
	struct capacity capacity;
	struct ibv_qp_attr attr;
	struct send sends[MAX_CHAIN];
	struct ibv_sge sge[MAX_SGES];
};

struct reply {
	int64_t result;
	int bad;
	struct region region;
	struct ibv_wc wcs[MAX_WCS];
	struct event event;
	union ibv_gid gid;
	uint16_t lid;
};

struct state {
	struct ibv_context *context;
	struct ibv_pd *pd, *other_pd;
	struct ibv_comp_channel *channels[2];
	struct ibv_cq *cqs[2];
	struct ibv_qp *qps[MAX_QPS];
	struct ibv_mr *mrs[MAX_MRS];
	unsigned char *arena;
	int gid_index;
};

struct side {
	struct state *local;
	int socket;
	pid_t child;
};

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void open_device(struct state *s)
{
	int count;
	const char *index = getenv("GID_INDEX");
	struct ibv_device **list = ibv_get_device_list(&count);

	CHECK(list && count > 0, "no device: errno %d", errno);
	s->gid_index = index ? atoi(index) : 0;
	s->context = ibv_open_device(list[0]);
	CHECK(s->context, "errno %d", errno);
	ibv_free_device_list(list);
	s->pd = ibv_alloc_pd(s->context);
	s->other_pd = ibv_alloc_pd(s->context);
	CHECK(s->pd && s->other_pd, "errno %d", errno);
	for (int i = 0; i < 2; i++) {
		s->channels[i] = ibv_create_comp_channel(s->context);
		CHECK(s->channels[i], "errno %d", errno);
		s->cqs[i] = ibv_create_cq(s->context, CQ_DEPTH, NULL, s->channels[i], 0);
		CHECK(s->cqs[i], "errno %d", errno);
	}
	int file = -1, kind = MAP_PRIVATE | MAP_ANONYMOUS;

	if (getenv("SHARED_ARENA")) {
		file = memfd_create("arena", MFD_CLOEXEC);
		kind = MAP_SHARED;
		CHECK(file >= 0 && !ftruncate(file, ARENA_BYTES), "errno %d", errno);
	}
	s->arena = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, kind, file, 0);
	CHECK(s->arena != MAP_FAILED, "errno %d", errno);
	/* Events are waited for with poll, so that a missing one is an answer and not a hang. */
	fcntl(s->context->async_fd, F_SETFL, fcntl(s->context->async_fd, F_GETFL) | O_NONBLOCK);
}

static void reg(struct state *s, const struct request *in, struct reply *out)
{
	for (int i = 0; i < MAX_MRS; i++) {
		if (s->mrs[i])
			continue;
		s->mrs[i] = ibv_reg_mr(in->index ? s->other_pd : s->pd, s->arena + in->offset, in->length, in->mask);
		if (!s->mrs[i]) {
			out->result = errno;
			return;
		}
		out->region = (struct region){i, (uintptr_t)s->mrs[i]->addr, s->mrs[i]->lkey, s->mrs[i]->rkey};
		return;
	}
	CHECK(false, "more than %d regions", MAX_MRS);
}

static void create_qp(struct state *s, const struct request *in, struct reply *out)
{
	struct ibv_qp_init_attr init = {
		.send_cq = s->cqs[SEND_CQ],
		.recv_cq = s->cqs[RECV_CQ],
		.cap = {in->capacity.send_wr, in->capacity.recv_wr, in->capacity.sges, in->capacity.sges,
			in->capacity.inline_bytes},
		.qp_type = IBV_QPT_RC,
		.sq_sig_all = in->capacity.all_signaled,
	};

	for (int i = 0; i < MAX_QPS; i++) {
		if (s->qps[i])
			continue;
		s->qps[i] = ibv_create_qp(s->pd, &init);
		out->result = s->qps[i] ? 0 : errno;
		out->bad = i;
		return;
	}
	CHECK(false, "more than %d queue pairs", MAX_QPS);
}

static void modify(struct state *s, const struct request *in, struct reply *out)
{
	struct ibv_qp_attr attr = in->attr;

	attr.ah_attr.grh.sgid_index = s->gid_index;
	out->result = ibv_modify_qp(s->qps[in->index], &attr, in->mask);
}

static void post(struct state *s, const struct request *in, struct reply *out)
{
	struct ibv_send_wr wrs[MAX_CHAIN], *bad = NULL;
	struct ibv_sge sges[MAX_CHAIN][MAX_SGES];

	memset(wrs, 0, sizeof(wrs));
	for (int i = 0; i < in->count; i++) {
		const struct send *send = &in->sends[i];

		memcpy(sges[i], send->sge, sizeof(sges[i]));
		wrs[i].wr_id = send->wr_id;
		wrs[i].next = i + 1 < in->count ? &wrs[i + 1] : NULL;
		wrs[i].sg_list = sges[i];
		wrs[i].num_sge = send->sges;
		wrs[i].opcode = send->opcode;
		wrs[i].send_flags = send->flags;
		wrs[i].imm_data = send->imm;
		if (send->opcode == IBV_WR_ATOMIC_CMP_AND_SWP || send->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
			wrs[i].wr.atomic.remote_addr = send->remote_addr;
			wrs[i].wr.atomic.rkey = send->rkey;
			wrs[i].wr.atomic.compare_add = send->compare_add;
			wrs[i].wr.atomic.swap = send->swap;
		} else {
			wrs[i].wr.rdma.remote_addr = send->remote_addr;
			wrs[i].wr.rdma.rkey = send->rkey;
		}
	}
	out->result = ibv_post_send(s->qps[in->index], wrs, &bad);
	out->bad = out->result ? (int)(bad - wrs) : -1;
	/* Inline data belongs to the caller again when the call returns: what is there now must not be sent. */
	for (int i = 0; i < in->count; i++) {
		if (!out->result && in->sends[i].flags & IBV_SEND_INLINE)
			memset((void *)(uintptr_t)in->sends[i].sge[0].addr, 0xee, in->sends[i].sge[0].length);
	}
}

static void post_recv(struct state *s, const struct request *in, struct reply *out)
{
	struct ibv_sge sge[MAX_SGES];
	struct ibv_recv_wr wr = {.wr_id = in->value, .sg_list = sge, .num_sge = in->count}, *bad;

	memcpy(sge, in->sge, sizeof(sge));
	out->result = ibv_post_recv(s->qps[in->index], &wr, &bad);
}

static void poll_cq(struct state *s, const struct request *in, struct reply *out)
{
	int64_t deadline = now_ms() + in->ms;
	int found = 0;

	do {
		int n = ibv_poll_cq(s->cqs[in->index], in->count - found, out->wcs + found);

		CHECK(n >= 0, "ibv_poll_cq returned %d", n);
		found += n;
		if (found < in->count && !n && in->ms)
			usleep(200);
	} while (found < in->count && now_ms() < deadline);
	out->result = found;
}

static void wait_event(struct state *s, const struct request *in, struct reply *out)
{
	struct pollfd fd = {.fd = s->channels[in->index]->fd, .events = POLLIN};
	struct ibv_cq *cq;
	void *user;

	out->result = poll(&fd, 1, in->ms) == 1;
	if (out->result) {
		CHECK_EQ(ibv_get_cq_event(s->channels[in->index], &cq, &user), 0);
		CHECK(cq == s->cqs[in->index]);
		ibv_ack_cq_events(cq, 1);
	}
}

static void wait_async(struct state *s, const struct request *in, struct reply *out)
{
	struct pollfd fd = {.fd = s->context->async_fd, .events = POLLIN};
	struct ibv_async_event event;

	out->event = (struct event){-1, -1};
	if (poll(&fd, 1, in->ms) != 1)
		return;
	CHECK_EQ(ibv_get_async_event(s->context, &event), 0);
	out->event.type = event.event_type;
	for (int i = 0; i < MAX_QPS; i++) {
		if (s->qps[i] && event.element.qp == s->qps[i])
			out->event.qp = i;
	}
	ibv_ack_async_event(&event);
}

static unsigned char pattern(uint64_t position, uint32_t seed)
{
	uint64_t x = (position + 1) * 0x9e3779b97f4a7c15ull ^ (uint64_t)seed * 0xbf58476d1ce4e5b9ull;

	return (x >> 56) ^ (x >> 24);
}

static int64_t first_difference(const unsigned char *at, uint64_t length, uint32_t seed)
{
	for (uint64_t i = 0; i < length; i++) {
		if (at[i] != pattern(i, seed))
			return i;
	}
	return -1;
}

static int64_t first_likeness(const unsigned char *at, uint64_t length, uint32_t seed)
{
	enum { LIKE = 16 };

	for (uint64_t i = 0; i + LIKE <= length; i += LIKE) {
		int like = 0;

		while (like < LIKE && at[i + like] == pattern(i + like, seed))
			like++;
		if (like == LIKE)
			return i;
	}
	return -1;
}

static void serve(struct state *s, const struct request *in, struct reply *out)
{
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;
	struct ibv_port_attr port;

	switch (in->op) {
	case OPEN:
		return open_device(s);
	case REG:
		return reg(s, in, out);
	case DEREG:
		out->result = ibv_dereg_mr(s->mrs[in->index]);
		if (!out->result)
			s->mrs[in->index] = NULL;
		return;
	case QP:
		return create_qp(s, in, out);
	case QP_NUM:
		out->result = s->qps[in->index]->qp_num;
		return;
	case MODIFY:
		return modify(s, in, out);
	case STATE:
		CHECK_EQ(ibv_query_qp(s->qps[in->index], &attr, IBV_QP_STATE, &init), 0);
		out->result = attr.qp_state;
		return;
	case DESTROY_QP:
		out->result = ibv_destroy_qp(s->qps[in->index]);
		if (!out->result)
			s->qps[in->index] = NULL;
		return;
	case GID:
		CHECK_EQ(ibv_query_gid(s->context, 1, s->gid_index, &out->gid), 0);
		CHECK_EQ(ibv_query_port(s->context, 1, &port), 0);
		out->lid = port.lid;
		return;
	case POST:
		return post(s, in, out);
	case RECV:
		return post_recv(s, in, out);
	case POLL:
		return poll_cq(s, in, out);
	case NOTIFY:
		out->result = ibv_req_notify_cq(s->cqs[in->index], in->mask);
		return;
	case EVENT:
		return wait_event(s, in, out);
	case ASYNC:
		return wait_async(s, in, out);
	case FILL:
		for (uint64_t i = 0; i < in->length; i++)
			s->arena[in->offset + i] = pattern(i, in->value);
		return;
	case DIFFERS:
		out->result = first_difference(s->arena + in->offset, in->length, in->value);
		return;
	case HOLDS:
		out->result = first_likeness(s->arena + in->offset, in->length, in->value);
		return;
	case PEEK:
		out->result = *(volatile int64_t *)(s->arena + in->offset);
		return;
	case POKE:
		*(volatile uint64_t *)(s->arena + in->offset) = in->value;
		return;
	}
	CHECK(false, "operation %d", in->op);
}

static struct reply call(struct side *side, struct request in)
{
	struct reply out;

	memset(&out, 0, sizeof(out));
	if (side->local) {
		serve(side->local, &in, &out);
		return out;
	}
	CHECK_EQ(send(side->socket, &in, sizeof(in), MSG_NOSIGNAL), sizeof(in));
	CHECK(recv(side->socket, &out, sizeof(out), 0) == sizeof(out), "the other side's process has ended");
	return out;
}

struct side *side_here(void)
{
	struct side *side = calloc(1, sizeof(*side));

	side->local = calloc(1, sizeof(*side->local));
	call(side, (struct request){.op = OPEN});
	return side;
}

struct side *side_in_child(const char *socket)
{
	struct side *side = calloc(1, sizeof(*side));
	struct state state = {0};
	struct request in;
	int ends[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends), 0);
	side->child = fork();
	CHECK(side->child >= 0, "errno %d", errno);
	if (side->child) {
		close(ends[1]);
		side->socket = ends[0];
		call(side, (struct request){.op = OPEN});
		return side;
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(ends[0]);
	if (socket)
		setenv("RINGFENCE_SOCKET", socket, 1);
	while (recv(ends[1], &in, sizeof(in), 0) == sizeof(in)) {
		struct reply out;

		memset(&out, 0, sizeof(out));
		serve(&state, &in, &out);
		if (send(ends[1], &out, sizeof(out), MSG_NOSIGNAL) != sizeof(out))
			break;
	}
	_exit(0);
}

void side_kill(struct side *side)
{
	CHECK(side->child, "only a side in a child can be killed");
	kill(side->child, SIGKILL);
	waitpid(side->child, NULL, 0);
}

int side_try_reg(struct side *side, uint64_t offset, uint64_t length, int access, struct region *region)
{
	struct reply out = call(side, (struct request){.op = REG, .offset = offset, .length = length, .mask = access});

	*region = out.region;
	return out.result;
}

struct region side_reg(struct side *side, uint64_t offset, uint64_t length, int access)
{
	struct region region;

	CHECK_EQ(side_try_reg(side, offset, length, access, &region), 0);
	return region;
}

struct region side_reg_in_other_pd(struct side *side, uint64_t offset, uint64_t length, int access)
{
	struct reply out =
		call(side, (struct request){.op = REG, .index = 1, .offset = offset, .length = length, .mask = access});

	CHECK_EQ(out.result, 0);
	return out.region;
}

int side_dereg(struct side *side, struct region region)
{
	return call(side, (struct request){.op = DEREG, .index = region.index}).result;
}

int side_try_qp(struct side *side, struct capacity capacity, int *qp)
{
	struct reply out = call(side, (struct request){.op = QP, .capacity = capacity});

	*qp = out.bad;
	return out.result;
}

int side_qp(struct side *side, struct capacity capacity)
{
	int qp;

	CHECK_EQ(side_try_qp(side, capacity, &qp), 0);
	return qp;
}

uint32_t side_qp_num(struct side *side, int qp)
{
	return call(side, (struct request){.op = QP_NUM, .index = qp}).result;
}

int side_modify(struct side *side, int qp, const struct ibv_qp_attr *attr, int mask)
{
	return call(side, (struct request){.op = MODIFY, .index = qp, .attr = *attr, .mask = mask}).result;
}

enum ibv_qp_state side_state(struct side *side, int qp)
{
	return call(side, (struct request){.op = STATE, .index = qp}).result;
}

int side_destroy_qp(struct side *side, int qp)
{
	return call(side, (struct request){.op = DESTROY_QP, .index = qp}).result;
}

union ibv_gid side_gid(struct side *side, uint16_t *lid)
{
	struct reply out = call(side, (struct request){.op = GID});

	*lid = out.lid;
	return out.gid;
}

int side_try_post(struct side *side, int qp, const struct send *sends, int count, int *bad)
{
	struct request in = {.op = POST, .index = qp, .count = count};
	struct reply out;

	memcpy(in.sends, sends, count * sizeof(*sends));
	out = call(side, in);
	if (bad)
		*bad = out.bad;
	return out.result;
}

void side_post(struct side *side, int qp, struct send send)
{
	CHECK_EQ(side_try_post(side, qp, &send, 1, NULL), 0);
}

int side_try_recv(struct side *side, int qp, uint64_t wr_id, const struct ibv_sge *sge, int sges)
{
	struct request in = {.op = RECV, .index = qp, .value = wr_id, .count = sges};

	memcpy(in.sge, sge, sges * sizeof(*sge));
	return call(side, in).result;
}

void side_recv(struct side *side, int qp, uint64_t wr_id, struct region region, uint64_t offset, uint32_t length)
{
	struct ibv_sge sge = {region.addr + offset, length, region.lkey};

	CHECK_EQ(side_try_recv(side, qp, wr_id, &sge, 1), 0);
}

int side_poll(struct side *side, int cq, struct ibv_wc *wcs, int count, int ms)
{
	struct reply out = call(side, (struct request){.op = POLL, .index = cq, .count = count, .ms = ms});

	memcpy(wcs, out.wcs, out.result * sizeof(*wcs));
	return out.result;
}

struct ibv_wc side_wc(struct side *side, int cq, uint64_t wr_id, enum ibv_wc_status status)
{
	struct ibv_wc wc;

	CHECK(side_poll(side, cq, &wc, 1, 5000) == 1, "no completion in 5 s; awaited wr_id %lu with %s",
	      (unsigned long)wr_id, ibv_wc_status_str(status));
	CHECK(wc.wr_id == wr_id && wc.status == status, "wr_id %lu with %s (vendor %u), expected %lu with %s",
	      (unsigned long)wc.wr_id, ibv_wc_status_str(wc.status), wc.vendor_err, (unsigned long)wr_id,
	      ibv_wc_status_str(status));
	return wc;
}

void side_silent(struct side *side, int cq)
{
	struct ibv_wc wc;

	CHECK(side_poll(side, cq, &wc, 1, 50) == 0, "unexpected completion: wr_id %lu with %s", (unsigned long)wc.wr_id,
	      ibv_wc_status_str(wc.status));
}

int side_notify(struct side *side, int cq, bool solicited_only)
{
	return call(side, (struct request){.op = NOTIFY, .index = cq, .mask = solicited_only}).result;
}

bool side_event(struct side *side, int cq, int ms)
{
	return call(side, (struct request){.op = EVENT, .index = cq, .ms = ms}).result;
}

struct event side_async(struct side *side, int ms)
{
	return call(side, (struct request){.op = ASYNC, .ms = ms}).event;
}

void side_fill(struct side *side, uint64_t offset, uint64_t length, uint32_t seed)
{
	call(side, (struct request){.op = FILL, .offset = offset, .length = length, .value = seed});
}

int64_t side_differs(struct side *side, uint64_t offset, uint64_t length, uint32_t seed)
{
	return call(side, (struct request){.op = DIFFERS, .offset = offset, .length = length, .value = seed}).result;
}

int64_t side_holds(struct side *side, uint64_t offset, uint64_t length, uint32_t seed)
{
	return call(side, (struct request){.op = HOLDS, .offset = offset, .length = length, .value = seed}).result;
}

uint64_t side_peek(struct side *side, uint64_t offset)
{
	return call(side, (struct request){.op = PEEK, .offset = offset}).result;
}

void side_poke(struct side *side, uint64_t offset, uint64_t value)
{
	call(side, (struct request){.op = POKE, .offset = offset, .value = value});
}
