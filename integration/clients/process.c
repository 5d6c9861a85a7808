/*
 * Processes that fork, exec, die and take too much.
 *
 *   process children     forked and executed children use verbs beside their parent
 *   process stream       writes for ever; says `streaming` once that works
 *   process once         one WRITE and a clean end
 *   process quota QP MR BYTES CQ    takes all of what the policy grants, and one more of each
 */
#include "loop.h"

#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LENGTH = 1 << 20 };

static void ended_well(pid_t child, const char *what)
{
	int status;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: status %#x", what, status);
}

static void once(void)
{
	struct loop loop = loop_open();
	unsigned char *memory = calloc(2, LENGTH);
	struct ibv_mr *from = loop_reg(&loop, memory, LENGTH), *to = loop_reg(&loop, memory + LENGTH, LENGTH);

	memset(memory, 0x5a, LENGTH);
	loop_write(&loop, to, memory + LENGTH, from, memory, LENGTH);
	CHECK_EQ(memcmp(memory, memory + LENGTH, LENGTH), 0);
	loop_dereg(from);
	loop_dereg(to);
	loop_close(&loop);
	free(memory);
}

static void children(const char *self)
{
	struct loop loop = loop_open();
	unsigned char *memory = calloc(2, LENGTH);
	struct ibv_mr *from = loop_reg(&loop, memory, LENGTH), *to = loop_reg(&loop, memory + LENGTH, LENGTH);

	for (int round = 0; round < 5; round++) {
		pid_t child = fork();

		if (!child) {
			/* The parent's objects are not the child's; a connection of its own is. */
			once();
			_exit(0);
		}
		memory[round] = round + 1;
		loop_write(&loop, to, memory + LENGTH, from, memory, LENGTH);
		CHECK_EQ(memory[LENGTH + round], round + 1);
		ended_well(child, "a forked child that uses verbs");

		child = fork();
		if (!child) {
			execl(self, self, "once", (char *)NULL);
			_exit(127);
		}
		ended_well(child, "an executed child that uses verbs");
		CHECK_EQ(system("true"), 0);
		loop_write(&loop, to, memory + LENGTH, from, memory, LENGTH);
	}
	loop_dereg(from);
	loop_dereg(to);
	loop_close(&loop);
}

static void stream(void)
{
	struct loop loop = loop_open();
	unsigned char *memory = calloc(2, LENGTH);
	struct ibv_mr *from = loop_reg(&loop, memory, LENGTH), *to = loop_reg(&loop, memory + LENGTH, LENGTH);
	uint64_t posted = 0, completed = 0;
	struct ibv_wc wcs[16];

	for (;;) {
		while (posted - completed < 48 && loop_post_write(&loop, posted, to, from, LENGTH) == 0)
			posted++;
		int n = ibv_poll_cq(loop.cq, 16, wcs);

		CHECK(n >= 0);
		for (int i = 0; i < n; i++)
			CHECK_EQ(wcs[i].status, IBV_WC_SUCCESS);
		if (completed == 0 && n > 0) {
			puts("streaming");
			fflush(stdout);
		}
		completed += n;
	}
}

static void quota(int qps, int mrs, size_t bytes, int cqs)
{
	int count;
	struct ibv_device **list = ibv_get_device_list(&count);
	struct ibv_context *context = ibv_open_device(list[0]);
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_cq *cq[cqs];
	struct ibv_qp *qp[qps];
	struct ibv_mr *mr[mrs];
	unsigned char *small = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned char *large = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(pd && small != MAP_FAILED && large != MAP_FAILED);
	for (int i = 0; i < cqs; i++) {
		cq[i] = ibv_create_cq(context, 16, NULL, NULL, 0);
		CHECK(cq[i], "completion queue %d: errno %d", i, errno);
	}
	CHECK(!ibv_create_cq(context, 16, NULL, NULL, 0));
	CHECK_EQ(errno, ENOMEM);

	struct ibv_qp_init_attr init = {
		.send_cq = cq[0], .recv_cq = cq[0], .cap = {16, 16, 1, 1, 0}, .qp_type = IBV_QPT_RC};

	for (int i = 0; i < qps; i++) {
		qp[i] = ibv_create_qp(pd, &init);
		CHECK(qp[i], "queue pair %d: errno %d", i, errno);
	}
	CHECK(!ibv_create_qp(pd, &init));
	CHECK_EQ(errno, ENOMEM);
	/* What is given back can be had again. */
	CHECK_EQ(ibv_destroy_qp(qp[0]), 0);
	qp[0] = ibv_create_qp(pd, &init);
	CHECK(qp[0], "errno %d", errno);

	for (int i = 0; i < mrs; i++) {
		mr[i] = ibv_reg_mr(pd, small, 64, IBV_ACCESS_LOCAL_WRITE);
		CHECK(mr[i], "memory region %d: errno %d", i, errno);
	}
	CHECK(!ibv_reg_mr(pd, small, 64, IBV_ACCESS_LOCAL_WRITE));
	CHECK_EQ(errno, ENOMEM);
	/* Nor does memory that was shared before leave anything when it is refused. */
	unsigned char *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int before = open_descriptors();

	for (int i = 0; i < 20; i++)
		CHECK(!ibv_reg_mr(pd, shared, 4096, IBV_ACCESS_LOCAL_WRITE) && errno == ENOMEM, "errno %d", errno);
	CHECK(open_descriptors() <= before);
	for (int i = 0; i < mrs; i++)
		CHECK_EQ(ibv_dereg_mr(mr[i]), 0);
	for (int i = 0; i < mrs; i++) {
		mr[i] = ibv_reg_mr(pd, i ? small : shared, 64, IBV_ACCESS_LOCAL_WRITE);
		CHECK(mr[i], "memory region %d: errno %d", i, errno);
	}
	for (int i = 0; i < mrs; i++)
		CHECK_EQ(ibv_dereg_mr(mr[i]), 0);

	mr[0] = ibv_reg_mr(pd, large, bytes, IBV_ACCESS_LOCAL_WRITE);
	CHECK(mr[0], "errno %d", errno);
	CHECK(!ibv_reg_mr(pd, small, 4096, IBV_ACCESS_LOCAL_WRITE));
	CHECK_EQ(errno, ENOMEM);
	CHECK_EQ(ibv_dereg_mr(mr[0]), 0);
	CHECK(ibv_reg_mr(pd, small, 4096, IBV_ACCESS_LOCAL_WRITE), "errno %d", errno);
}

/* Without room for a descriptor, calls that need one fail, and nothing else does. */
static void descriptors(void)
{
	struct loop loop = loop_open();
	struct ibv_qp_init_attr init = {
		.send_cq = loop.cq,
		.recv_cq = loop.cq,
		.cap = {.max_send_wr = 1, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1},
		.qp_type = IBV_QPT_RC,
	};
	struct rlimit before, none;
	int next = dup(0), few = open_descriptors();
	void *at = aligned_alloc(4096, 8192);
	struct ibv_mr *mr;

	CHECK(next >= 0 && at);
	close(next);
	CHECK_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
	none = before;
	none.rlim_cur = next;
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
	/* More often than the policy allows objects. */
	for (int i = 0; i < 20; i++) {
		CHECK(!ibv_create_qp(loop.pd, &init) && errno == EMFILE, "errno %d", errno);
		CHECK(!ibv_create_cq(loop.context, 1, NULL, NULL, 0) && errno == EMFILE, "errno %d", errno);
		CHECK(!ibv_create_comp_channel(loop.context) && errno == EMFILE, "errno %d", errno);
		CHECK(!ibv_open_device(loop.context->device) && errno == EMFILE, "errno %d", errno);
		CHECK(!ibv_reg_mr(loop.pd, at, 8192, IBV_ACCESS_LOCAL_WRITE) && errno == EMFILE, "errno %d", errno);
	}
	CHECK_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
	mr = loop_reg(&loop, at, 8192);
	loop_write(&loop, mr, at, mr, (char *)at + 4096, 4096);
	loop_dereg(mr);
	/* The file for the next registration comes with the answer to one, as if there had always been room. One was open above. */
	CHECK_EQ(open_descriptors(), few);
	loop_close(&loop);
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";

	if (!strcmp(mode, "children"))
		children(argv[0]);
	else if (!strcmp(mode, "stream"))
		stream();
	else if (!strcmp(mode, "once"))
		once();
	else if (!strcmp(mode, "descriptors"))
		descriptors();
	else if (!strcmp(mode, "quota") && argc == 6)
		quota(atoi(argv[2]), atoi(argv[3]), strtoull(argv[4], NULL, 10), atoi(argv[5]));
	else
		return 2;
	return 0;
}
