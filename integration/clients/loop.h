/* Two queue pairs of one process joined to each other: the shortest way to move memory by RDMA. */
#pragma once

#include "check.h"

#include <infiniband/verbs.h>

struct loop {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp *from, *to;
};

struct loop loop_open(void);
void loop_close(struct loop *loop);

/* `ibv_reg_mr` that must succeed, with every access right that a private registration may have. */
struct ibv_mr *loop_reg(struct loop *loop, void *at, size_t length);
void loop_dereg(struct ibv_mr *mr);

/* One RDMA WRITE of `length` bytes to its completion. */
void loop_write(struct loop *loop, struct ibv_mr *to, void *to_at, struct ibv_mr *from, void *from_at, uint32_t length);
/* One WRITE posted, nobody waits. Returns errno. */
int loop_post_write(struct loop *loop, uint64_t wr_id, struct ibv_mr *to, struct ibv_mr *from, uint32_t length);

/* Bytes that depend on their place and on `seed`. */
void loop_fill(unsigned char *at, size_t length, unsigned seed);
void loop_check_filled(const unsigned char *at, size_t length, unsigned seed);
/* Whether the page at `at` is mapped shared. */
bool loop_is_shared(const void *at);
