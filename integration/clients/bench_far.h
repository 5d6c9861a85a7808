/*
 * A connection to a process that does nothing but be there.
 *
 * The far end is a child of this process. It uses the proxy whose socket RINGFENCE_FAR names, which makes it another container,
 * or that of this process.
 */
#pragma once

#include "check.h"

#include <infiniband/verbs.h>

enum { DEPTH = 256, RECEIVES = 1024 };

struct road_options {
	/* Of memory at each end. */
	size_t bytes;
	/* How far into a page that begins. */
	size_t offset;
	/* Queue pairs; 1 if it is 0. */
	int qps;
	/* The far end keeps RECEIVES receives of so many bytes posted, and polls for them; if 0 it sleeps. */
	uint32_t receive_bytes;
};

struct road {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp **qps;
	int count;
	/* Memory at this end. */
	struct ibv_mr *near;
	/* And at the other. */
	uint64_t far_addr;
	uint32_t far_rkey;
	int socket, child;
};

/* Before anything else is done with verbs. */
struct road road_open(struct road_options options);
/* Ends the far end. */
void road_close(struct road *road);

/* A signaled request over as many bytes of the near memory as `sge` says, which is filled in but for that. */
struct ibv_send_wr road_request(const struct road *road, enum ibv_wr_opcode opcode, struct ibv_sge *sge);

/* Takes `count` completions, all of them good. */
void poll_for(struct ibv_cq *cq, int count);
