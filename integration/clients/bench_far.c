/* See bench_far.h. */
#include "bench_far.h"

#include "bench_time.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

/* What the ends tell each other. */
struct letter {
	union ibv_gid gid;
	uint64_t addr;
	uint32_t rkey;
	uint16_t lid;
	uint32_t numbers[];
};

/* Set when the far end is to stop receiving: it makes no system call to find out. */
static atomic_int *stop;

static void send_all(int socket, const void *from, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t step = write(socket, (const char *)from + done, length - done);
		CHECK(step > 0, "the other end is gone");
		done += (size_t)step;
	}
}

static void receive_all(int socket, void *to, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t step = read(socket, (char *)to + done, length - done);
		CHECK(step > 0, "the other end is gone");
		done += (size_t)step;
	}
}

static void modify(struct ibv_qp *qp, struct ibv_qp_attr attr, int mask)
{
	CHECK_EQ(ibv_modify_qp(qp, &attr, mask | IBV_QP_STATE), 0);
}

static void connect_qp(struct ibv_qp *qp, const struct letter *far, uint32_t number, uint8_t atomics)
{
	const int access =
		IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
	struct ibv_ah_attr path = {.is_global = 1, .port_num = 1, .dlid = far->lid};

	path.grh.dgid = far->gid;
	path.grh.hop_limit = 64;
	modify(qp, (struct ibv_qp_attr){.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = access},
	       IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
	/* A receiver that is not ready is asked again soon. */
	modify(qp,
	       (struct ibv_qp_attr){.qp_state = IBV_QPS_RTR,
				    .path_mtu = IBV_MTU_4096,
				    .dest_qp_num = number,
				    .max_dest_rd_atomic = atomics,
				    .min_rnr_timer = 1,
				    .ah_attr = path},
	       IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
		       IBV_QP_MIN_RNR_TIMER);
	/* Four seconds: on a busy machine nobody is gone who does not answer for long. */
	modify(qp,
	       (struct ibv_qp_attr){.qp_state = IBV_QPS_RTS,
				    .timeout = 20,
				    .retry_cnt = 7,
				    .rnr_retry = 7,
				    .max_rd_atomic = atomics},
	       IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

static void open_end(struct road *road, struct road_options options)
{
	int count;
	struct ibv_device **list = ibv_get_device_list(&count);

	CHECK(list && count > 0, "no device: errno %d", errno);
	road->context = ibv_open_device(list[0]);
	CHECK(road->context, "errno %d", errno);
	ibv_free_device_list(list);
	road->pd = ibv_alloc_pd(road->context);
	CHECK(road->pd, "errno %d", errno);
	road->cq = ibv_create_cq(road->context, 16384, NULL, NULL, 0);
	CHECK(road->cq, "errno %d", errno);
	road->near = ibv_reg_mr(road->pd, memory(options.bytes + options.offset) + options.offset, options.bytes,
				IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
					IBV_ACCESS_REMOTE_ATOMIC);
	CHECK(road->near, "errno %d", errno);
	road->count = options.qps;
	road->qps = calloc((size_t)options.qps, sizeof(struct ibv_qp *));
	CHECK(road->qps, "no memory");
	for (int i = 0; i < options.qps; i++) {
		/* Of many, each is shallow. */
		struct ibv_qp_init_attr init = {.send_cq = road->cq,
						.recv_cq = road->cq,
						.cap = {i ? 32 : DEPTH, i ? 1 : RECEIVES, 1, 1, 64},
						.qp_type = IBV_QPT_RC};

		road->qps[i] = ibv_create_qp(road->pd, &init);
		CHECK(road->qps[i], "queue pair %d: errno %d", i, errno);
	}
}

static void join_ends(struct road *road)
{
	size_t length = sizeof(struct letter) + (size_t)road->count * sizeof(uint32_t);
	struct letter *ours = calloc(1, length), *theirs = calloc(1, length);
	struct ibv_device_attr device;
	struct ibv_port_attr port;
	int most;

	CHECK(ours && theirs, "no memory");
	CHECK_EQ(ibv_query_device(road->context, &device), 0);
	CHECK_EQ(ibv_query_port(road->context, 1, &port), 0);
	CHECK_EQ(ibv_query_gid(road->context, 1, 0, &ours->gid), 0);
	ours->lid = port.lid;
	ours->addr = (uintptr_t)road->near->addr;
	ours->rkey = road->near->rkey;
	for (int i = 0; i < road->count; i++)
		ours->numbers[i] = road->qps[i]->qp_num;
	send_all(road->socket, ours, length);
	receive_all(road->socket, theirs, length);
	road->far_addr = theirs->addr;
	road->far_rkey = theirs->rkey;
	most = device.max_qp_rd_atom < device.max_qp_init_rd_atom ? device.max_qp_rd_atom : device.max_qp_init_rd_atom;
	for (int i = 0; i < road->count; i++)
		connect_qp(road->qps[i], theirs, theirs->numbers[i], (uint8_t)(most < 16 ? most : 16));
	free(ours);
	free(theirs);
}

/* Both ends have come so far. */
static void meet(int socket)
{
	char byte = 0;

	send_all(socket, &byte, 1);
	receive_all(socket, &byte, 1);
}

static void post_receive(struct road *road, uint32_t bytes)
{
	/* They go round the memory, as an application's buffers do. */
	static size_t at;
	struct ibv_sge sge = {(uintptr_t)road->near->addr + at, bytes, road->near->lkey};
	struct ibv_recv_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

	at = at + 2 * bytes > road->near->length ? 0 : at + bytes;
	CHECK_EQ(ibv_post_recv(road->qps[0], &wr, &bad), 0);
}

__attribute__((noreturn)) static void be_far(struct road *road, struct road_options options)
{
	const char *socket = getenv("RINGFENCE_FAR");
	struct ibv_wc wc[32];
	char byte;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (socket)
		setenv("RINGFENCE_SOCKET", socket, 1);
	open_end(road, options);
	join_ends(road);
	for (int i = 0; options.receive_bytes && i < RECEIVES; i++)
		post_receive(road, options.receive_bytes);
	meet(road->socket);
	while (options.receive_bytes && !atomic_load_explicit(stop, memory_order_relaxed)) {
		int got = ibv_poll_cq(road->cq, 32, wc);

		CHECK(got >= 0, "ibv_poll_cq");
		for (int i = 0; i < got; i++) {
			CHECK(wc[i].status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc[i].status));
			post_receive(road, options.receive_bytes);
		}
	}
	/* Until the near end has closed its own. */
	while (read(road->socket, &byte, 1) > 0)
		;
	_exit(0);
}

struct road road_open(struct road_options options)
{
	struct road road = {0};
	int pair[2];

	if (!options.qps)
		options.qps = 1;
	stop = mmap(NULL, sizeof *stop, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(stop != MAP_FAILED, "mmap");
	CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0, "socketpair");
	road.child = fork();
	CHECK(road.child >= 0, "fork");
	road.socket = pair[road.child == 0];
	close(pair[road.child != 0]);
	if (!road.child)
		be_far(&road, options);
	open_end(&road, options);
	join_ends(&road);
	meet(road.socket);
	return road;
}

void road_close(struct road *road)
{
	int status;

	atomic_store(stop, 1);
	close(road->socket);
	CHECK(waitpid(road->child, &status, 0) == road->child && status == 0, "the far end failed: status %d", status);
}

struct ibv_send_wr road_request(const struct road *road, enum ibv_wr_opcode opcode, struct ibv_sge *sge)
{
	struct ibv_send_wr wr = {.sg_list = sge, .num_sge = sge->length > 0, .opcode = opcode, .send_flags = IBV_SEND_SIGNALED};

	sge->addr = (uintptr_t)road->near->addr;
	sge->lkey = road->near->lkey;
	if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = road->far_addr;
		wr.wr.atomic.rkey = road->far_rkey;
		wr.wr.atomic.compare_add = 1;
	} else {
		wr.wr.rdma.remote_addr = road->far_addr;
		wr.wr.rdma.rkey = road->far_rkey;
	}
	return wr;
}

void poll_for(struct ibv_cq *cq, int count)
{
	struct ibv_wc wc[32];

	while (count > 0) {
		int got = ibv_poll_cq(cq, count < 32 ? count : 32, wc);

		CHECK(got >= 0, "ibv_poll_cq");
		for (int i = 0; i < got; i++)
			CHECK(wc[i].status == IBV_WC_SUCCESS, "%s", ibv_wc_status_str(wc[i].status));
		count -= got;
	}
}
