/*
 * libibverbs with a card that is not there: RC queue pairs of one process, which carry requests out at once, in memory.
 *
 * For tests of the proxy on machines whose kernel has no RDMA device. The proxy loads it in place of the distribution's library, and
 * it is compiled against the distribution's header: what the proxy thinks of the interface must be true of it. It is as strict as a
 * card: keys, protection domains, bounds and rights are checked, errors take queue pairs to the error state and flush them in order.
 * What a card never does, because it could not, it ends the process for: a completion queue that is overrun, something destroyed that
 * is in use, a queue that is longer than was asked for.
 *
 * There is no time in it: a peer that does not answer is given up at once, and so is one without a receive request, unless the
 * sender retries for ever. There are two of it: test0 carries requests out as they are posted; late0 one of each queue pair whenever
 * a completion queue is polled, so that something is always under way, and all when one is armed.
 *
 * Further ones are as those cards whose drivers have what others have not: paced0 sends only from queue pairs whose rate is PACE;
 * marked0 takes no path but of service level 3 and traffic class 104; the kernel of elsewhere0 finds no interface for any GID; twoport0
 * has a second port, which is the one that works; undrained0 has no state SQD; parted0 is in three partitions, of which
 * IBV_EVENT_PKEY_CHANGE takes one away or brings it back; replaced0 has another GUID when it comes back; draining0
 * never says that it has drained, as rxe, and does not take an atomic on other than 8 aligned bytes, of which its errno is negative, as
 * that of rxe before rdma-core 44.
 *
 * A program makes events of port and card happen by a WRITE with immediate data 0xeeee0000 and the event, and 0x1000 if it is to be one
 * of a port that no container has; with 0x2000 the GIDs go before it, or come back as those of RoCE v1; with 0x4000 nobody can read the
 * table of them some times, and with 0x8000 that of partitions at first. After IBV_EVENT_DEVICE_FATAL the card answers nothing any more but EIO. It
 * is back when the list of cards has been read some times, and the table of GIDs cannot be read at first.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <infiniband/verbs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

#define MOST_MRS 4096
#define MOST_QPS 1024
#define MOST_GIDS 32
#define MOST_SGE 16
#define MOST_INLINE 512
/* kbit/s of 1 Gbit/s, and of the headers of packets of 1 KiB. */
#define PACE 1125000
#define REMOTE (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)

static void broken(const char *what)
{
	fprintf(stderr, "test provider: %s\n", what);
	abort();
}

struct mr {
	struct ibv_mr base;
	uint64_t iova;
	unsigned int access;
	/* What is to be unmapped with it. */
	void *mapped;
	size_t mapped_bytes;
};

struct pd {
	struct ibv_pd base;
	int users;
};

struct cq {
	struct ibv_cq base;
	struct ibv_wc *ring;
	unsigned int size, head, count;
	int armed, users;
};

struct send {
	struct ibv_send_wr wr;
	struct ibv_sge sges[MOST_SGE];
	uint8_t data[MOST_INLINE];
};

struct receive {
	uint64_t wr_id;
	int count;
	struct ibv_sge sges[MOST_SGE];
};

struct qp {
	struct ibv_qp base;
	struct ibv_qp_cap cap;
	struct ibv_qp_attr attr;
	struct send *sends;
	struct receive *receives;
	unsigned int send_head, send_count, receive_head, receive_count;
	/* kbit/s. */
	uint32_t rate;
	/* In SQD, and nobody has asked since. */
	int draining;
};

struct card {
	struct verbs_context verbs;
	int events[2];
	int late, gone;
};

static struct card *card_of(struct ibv_context *context)
{
	return (struct card *)((char *)context - offsetof(struct card, verbs.context));
}

/* Of the port that works. */
static struct {
	enum ibv_port_state state;
	uint16_t lid;
} port1 = {IBV_PORT_ACTIVE, 0};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
enum { LATE = 1, PACED = 3, MARKED, ELSEWHERE, TWO_PORTS, UNDRAINED, DRAINING, PARTED, REPLACED, DEVICES };

static struct ibv_device devices[DEVICES] = {
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "test0", .dev_name = "uverbs0"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "late0", .dev_name = "uverbs1"},
	{.node_type = IBV_NODE_RNIC, .transport_type = IBV_TRANSPORT_IWARP, .name = "iwarp0", .dev_name = "uverbs2"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "paced0", .dev_name = "uverbs3"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "marked0", .dev_name = "uverbs4"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "elsewhere0", .dev_name = "uverbs5"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "twoport0", .dev_name = "uverbs6"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "undrained0", .dev_name = "uverbs7"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "draining0", .dev_name = "uverbs8"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "parted0", .dev_name = "uverbs9"},
	{.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "replaced0", .dev_name = "uverbs10"}};

/* Of parted0; a full member of the third, a limited one of the fourth. */
static uint16_t partitions[] = {0xffff, 0, 0x8001, 0x0002};

static int partition_count(struct ibv_context *context)
{
	return context->device == &devices[PARTED] ? sizeof(partitions) / sizeof(*partitions) : 1;
}

static uint8_t working_port(struct ibv_context *context)
{
	return context->device == &devices[TWO_PORTS] ? 2 : 1;
}

/* How often the list of cards is read without this one, and whether it ever was. */
static int away[DEVICES], went[DEVICES];
static struct ibv_gid_entry gids[MOST_GIDS];
/* Of the table all but the first are gone. It cannot be read so many times. */
static int gid_count, gids_gone, gids_unread;
/* The same of the table of partitions. */
static int pkeys_unread;
static struct mr *mrs[MOST_MRS];
static uint8_t mr_lives[MOST_MRS];
static struct qp *qps[MOST_QPS];
static int qp_lives[MOST_QPS];
/* Behind these there never was one. */
static int qps_used;

/* Devices */

struct ibv_device **ibv_get_device_list(int *count)
{
	struct ibv_device **list = calloc(DEVICES + 1, sizeof(*list));

	*count = 0;
	for (int i = 0; i < DEVICES; i++) {
		if (away[i] && away[i]--)
			continue;
		list[(*count)++] = &devices[i];
	}
	return list;
}

void ibv_free_device_list(struct ibv_device **list)
{
	free(list);
}

__be64 ibv_get_device_guid(struct ibv_device *of)
{
	uint64_t number = (uint64_t)(of - devices);

	return htobe64(0x0200000000000042 + number + (number == REPLACED && went[number] ? 0x100 : 0));
}

int ibv_get_device_index(struct ibv_device *of)
{
	return 40 + (int)(of - devices);
}

static void add_gid(const uint8_t *raw)
{
	/* With a gap before each, so that the container's table is dense only if somebody makes it so. */
	if (gid_count == MOST_GIDS)
		return;
	gids[gid_count] = (struct ibv_gid_entry){
		.gid_index = 2 * gid_count + 1, .port_num = 1, .gid_type = IBV_GID_TYPE_ROCE_V2, .ndev_ifindex = 1};
	memcpy(gids[gid_count++].gid.raw, raw, 16);
}

static void list_gids(void)
{
	static const uint8_t foreign[16] = {0x20, 0x01, 0x0d, 0xb8, 1};
	struct ifaddrs *list, *at;

	gid_count = gids_gone = 0;
	/* Of somebody else on this card. */
	add_gid(foreign);
	if (getifaddrs(&list))
		return;
	for (at = list; at; at = at->ifa_next) {
		if (!at->ifa_addr || at->ifa_flags & IFF_LOOPBACK)
			continue;
		if (at->ifa_addr->sa_family == AF_INET) {
			uint8_t raw[16] = {[10] = 0xff, [11] = 0xff};

			memcpy(raw + 12, &((struct sockaddr_in *)at->ifa_addr)->sin_addr, 4);
			add_gid(raw);
		} else if (at->ifa_addr->sa_family == AF_INET6) {
			add_gid(((struct sockaddr_in6 *)at->ifa_addr)->sin6_addr.s6_addr);
		}
	}
	freeifaddrs(list);
}

static int carry_out(struct qp *);
static int poll_cq(struct ibv_cq *, int, struct ibv_wc *);
static int req_notify_cq(struct ibv_cq *, int);
static int post_send(struct ibv_qp *, struct ibv_send_wr *, struct ibv_send_wr **);
static int post_recv(struct ibv_qp *, struct ibv_recv_wr *, struct ibv_recv_wr **);
static int modify_qp_rate_limit(struct ibv_qp *, struct ibv_qp_rate_limit_attr *);
static int query_device_ex(struct ibv_context *, const struct ibv_query_device_ex_input *, struct ibv_device_attr_ex *, size_t);

/* By no system call that the proxy's sandbox forbids, in which the card is opened again. */
struct ibv_context *ibv_open_device(struct ibv_device *of)
{
	struct card *card = calloc(1, sizeof(*card));

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, card->events))
		return NULL;
	list_gids();
	card->verbs.context.device = of;
	card->late = of == &devices[LATE];
	card->verbs.context.async_fd = card->events[0];
	card->verbs.context.cmd_fd = -1;
	card->verbs.context.num_comp_vectors = 1;
	card->verbs.context.ops.poll_cq = poll_cq;
	card->verbs.context.ops.req_notify_cq = req_notify_cq;
	card->verbs.context.ops.post_send = post_send;
	card->verbs.context.ops.post_recv = post_recv;
	card->verbs.context.abi_compat = __VERBS_ABI_IS_EXTENDED;
	card->verbs.sz = sizeof(card->verbs);
	if (of == &devices[PACED]) {
		card->verbs.query_device_ex = query_device_ex;
		card->verbs.modify_qp_rate_limit = modify_qp_rate_limit;
	}
	return &card->verbs.context;
}

int ibv_close_device(struct ibv_context *context)
{
	(void)context;
	return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
	memset(attr, 0, sizeof(*attr));
	strcpy(attr->fw_ver, "test");
	attr->node_guid = attr->sys_image_guid = ibv_get_device_guid(context->device);
	attr->max_mr_size = UINT64_MAX;
	attr->page_size_cap = 0xfffff000;
	attr->vendor_id = 0xffffff;
	attr->max_qp = MOST_QPS;
	attr->max_qp_wr = 16384;
	attr->device_cap_flags = IBV_DEVICE_RC_RNR_NAK_GEN | IBV_DEVICE_SYS_IMAGE_GUID | IBV_DEVICE_CURR_QP_STATE_MOD;
	attr->max_sge = attr->max_sge_rd = MOST_SGE;
	attr->max_cq = 64;
	attr->max_cqe = 1 << 16;
	attr->max_mr = MOST_MRS;
	attr->max_pd = 4096;
	attr->max_qp_rd_atom = attr->max_qp_init_rd_atom = 16;
	attr->max_res_rd_atom = 16 * MOST_QPS;
	attr->atomic_cap = IBV_ATOMIC_HCA;
	attr->max_pkeys = partition_count(context);
	attr->phys_port_cnt = working_port(context);
	return 0;
}

static int query_device_ex(struct ibv_context *context, const struct ibv_query_device_ex_input *input,
			   struct ibv_device_attr_ex *attr, size_t size)
{
	if (input || size < offsetof(struct ibv_device_attr_ex, raw_packet_caps))
		return EINVAL;
	memset(attr, 0, size);
	attr->packet_pacing_caps.qp_rate_limit_min = 1000;
	attr->packet_pacing_caps.qp_rate_limit_max = 100000000;
	attr->packet_pacing_caps.supported_qpts = 1 << IBV_QPT_RC;
	return ibv_query_device(context, &attr->orig_attr);
}

int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *compat)
{
	struct ibv_port_attr *attr = (struct ibv_port_attr *)compat;

	if (card_of(context)->gone)
		return EIO;
	if (!port || port > working_port(context))
		return EINVAL;
	if (port != working_port(context)) {
		attr->state = IBV_PORT_DOWN;
		attr->gid_tbl_len = 2 * MOST_GIDS;
		return 0;
	}
	attr->state = port1.state;
	attr->lid = port1.lid;
	attr->max_mtu = attr->active_mtu = IBV_MTU_4096;
	attr->gid_tbl_len = 2 * MOST_GIDS;
	attr->port_cap_flags = IBV_PORT_IP_BASED_GIDS | IBV_PORT_CM_SUP;
	attr->max_msg_sz = 1 << 31;
	attr->pkey_tbl_len = partition_count(context);
	attr->active_width = port1.state == IBV_PORT_ACTIVE ? 2 : 1;
	attr->active_speed = port1.state == IBV_PORT_ACTIVE ? 32 : 1;
	attr->phys_state = port1.state == IBV_PORT_ACTIVE ? 5 : 3;
	attr->link_layer = IBV_LINK_LAYER_ETHERNET;
	return 0;
}

int ibv_query_pkey(struct ibv_context *context, uint8_t port, int index, __be16 *pkey)
{
	if (pkeys_unread) {
		pkeys_unread--;
		errno = ENOMEM;
		return -1;
	}
	if (port != working_port(context) || index < 0 || index >= partition_count(context)) {
		errno = ENOENT;
		return -1;
	}
	*pkey = htons(partitions[index]);
	return 0;
}

ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries, size_t most, uint32_t flags,
			     size_t size)
{
	size_t count = gids_gone ? 1 : (size_t)gid_count < most ? (size_t)gid_count : most;

	if (flags || size != sizeof(*entries))
		return -EINVAL;
	if (gids_unread) {
		gids_unread--;
		return -ENOMEM;
	}
	memcpy(entries, gids, count * size);
	for (size_t i = 0; i < count; i++)
		entries[i].port_num = working_port(context);
	/* The other port has somebody's address at the index of the first of the container's. */
	if (working_port(context) == 2 && count < most) {
		entries[count] = gids[0];
		entries[count++].gid_index = 3;
	}
	return count;
}

/* Domains and regions */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
	struct pd *pd = calloc(1, sizeof(*pd));

	pd->base.context = context;
	return &pd->base;
}

int ibv_dealloc_pd(struct ibv_pd *base)
{
	struct pd *pd = (struct pd *)base;

	if (pd->users)
		broken("a protection domain goes that is in use");
	free(pd);
	return 0;
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned int access)
{
	struct mr *mr;

	if (((uintptr_t)addr ^ iova) & 4095) {
		errno = EINVAL;
		return NULL;
	}
	pthread_mutex_lock(&lock);
	for (int i = 0; i < MOST_MRS; i++) {
		if (mrs[i])
			continue;
		mr = calloc(1, sizeof(*mr));
		mr->base = (struct ibv_mr){.context = pd->context, .pd = pd, .addr = addr, .length = length};
		mr->iova = iova;
		mr->access = access;
		/* As many cards': an index, and a byte that tells lives apart. The rkey is another. */
		mr->base.lkey = (uint32_t)(i + 1) << 8 | ++mr_lives[i];
		mr->base.rkey = access & REMOTE ? mr->base.lkey | 1u << 31 : 0;
		mrs[i] = mr;
		((struct pd *)pd)->users++;
		pthread_mutex_unlock(&lock);
		return &mr->base;
	}
	pthread_mutex_unlock(&lock);
	errno = ENOMEM;
	return NULL;
}

/* A memory file stands for a dma-buf: it can be mapped, as can those of some devices. */
struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova, int fd, int access)
{
	uint64_t start = offset & ~4095ull, bytes = offset - start + length;
	struct stat status;
	struct ibv_mr *mr;
	uint8_t *at;

	if (((offset ^ iova) & 4095) || fstat(fd, &status) || !S_ISREG(status.st_mode) ||
	    (uint64_t)status.st_size < offset + length) {
		errno = EINVAL;
		return NULL;
	}
	at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, start);
	if (at == MAP_FAILED)
		return NULL;
	mr = ibv_reg_mr_iova2(pd, at + (offset - start), length, iova, access);
	if (!mr) {
		munmap(at, bytes);
		return NULL;
	}
	((struct mr *)mr)->mapped = at;
	((struct mr *)mr)->mapped_bytes = bytes;
	return mr;
}

int ibv_dereg_mr(struct ibv_mr *base)
{
	struct mr *mr = (struct mr *)base;

	pthread_mutex_lock(&lock);
	mrs[(base->lkey >> 8) - 1] = NULL;
	((struct pd *)base->pd)->users--;
	if (mr->mapped)
		munmap(mr->mapped, mr->mapped_bytes);
	pthread_mutex_unlock(&lock);
	free(base);
	return 0;
}

static uint8_t *reach(uint32_t key, struct ibv_pd *pd, uint64_t addr, uint64_t length, unsigned int access, int remote)
{
	uint32_t index = (key & ~(1u << 31)) >> 8;
	struct mr *mr = index && index <= MOST_MRS ? mrs[index - 1] : NULL;

	if (!mr || key != (remote ? mr->base.rkey : mr->base.lkey) || mr->base.pd != pd || (mr->access & access) != access)
		return NULL;
	if (addr < mr->iova || length > mr->base.length || addr - mr->iova > mr->base.length - length)
		return NULL;
	return (uint8_t *)mr->base.addr + (addr - mr->iova);
}

/* For programs that use it themselves. */
struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	return ibv_reg_mr_iova2(pd, addr, length, (uintptr_t)addr, access);
}

int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid)
{
	(void)context;
	memset(gid, 0, sizeof(*gid));
	for (int i = 0; i < gid_count; i++)
		if (gids[i].gid_index == (uint32_t)index)
			*gid = gids[i].gid;
	return port == working_port(context) ? 0 : EINVAL;
}

const char *ibv_wc_status_str(enum ibv_wc_status status)
{
	static _Thread_local char text[16];

	snprintf(text, sizeof(text), "status %d", status);
	return text;
}

/* Completion queues */

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
	struct {
		struct ibv_comp_channel base;
		int write;
	} *channel = calloc(1, sizeof(*channel));
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends))
		return NULL;
	channel->base.context = context;
	channel->base.fd = ends[0];
	channel->write = ends[1];
	return &channel->base;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
	(void)channel;
	return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context, struct ibv_comp_channel *channel,
			     int vector)
{
	struct cq *cq = calloc(1, sizeof(*cq));

	if (vector)
		broken("there is one completion vector");
	cq->base = (struct ibv_cq){.context = context, .channel = channel, .cq_context = cq_context, .cqe = cqe};
	cq->size = cqe;
	cq->ring = calloc(cqe, sizeof(*cq->ring));
	return &cq->base;
}

int ibv_destroy_cq(struct ibv_cq *base)
{
	if (((struct cq *)base)->users)
		broken("a completion queue goes that is in use");
	return 0;
}

static void complete(struct cq *cq, struct ibv_wc wc)
{
	if (cq->count == cq->size)
		broken("a completion queue is overrun");
	cq->ring[(cq->head + cq->count++) % cq->size] = wc;
	if (cq->armed && cq->base.channel) {
		struct ibv_cq *base = &cq->base;

		cq->armed = 0;
		if (write(((int *)(cq->base.channel + 1))[0], &base, sizeof(base)) != sizeof(base))
			broken("the completion channel is full");
	}
}

static int is_gone(struct qp *qp)
{
	return card_of(qp->base.context)->gone;
}

/* Of each queue pair of a card that is late, one request or all. */
static void carry_on(struct ibv_context *context, int all)
{
	if (!card_of(context)->late || card_of(context)->gone)
		return;
	for (int i = 0; i < qps_used; i++) {
		struct qp *qp = qps[i];

		if (!qp || qp->base.context != context)
			continue;
		while (!is_gone(qp) && qp->base.state == IBV_QPS_RTS && qp->send_count && carry_out(qp) && all) {
		}
	}
}

static int poll_cq(struct ibv_cq *base, int most, struct ibv_wc *wc)
{
	struct cq *cq = (struct cq *)base;
	int count = 0;

	pthread_mutex_lock(&lock);
	carry_on(base->context, 0);
	for (; count < most && cq->count; count++, cq->count--) {
		wc[count] = cq->ring[cq->head];
		cq->head = (cq->head + 1) % cq->size;
	}
	pthread_mutex_unlock(&lock);
	return count;
}

static int req_notify_cq(struct ibv_cq *base, int solicited)
{
	if (solicited)
		broken("the proxy wants to hear of everything");
	pthread_mutex_lock(&lock);
	((struct cq *)base)->armed = 1;
	carry_on(base->context, 1);
	pthread_mutex_unlock(&lock);
	return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **cq_context)
{
	if (read(channel->fd, cq, sizeof(*cq)) != sizeof(*cq))
		return -1;
	*cq_context = (*cq)->cq_context;
	return 0;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int count)
{
	(void)cq;
	(void)count;
}

int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *event)
{
	if (read(context->async_fd, event, sizeof(*event)) == sizeof(*event))
		return 0;
	if (card_of(context)->gone)
		errno = EIO;
	return -1;
}

void ibv_ack_async_event(struct ibv_async_event *event)
{
	(void)event;
}

/* Queue pairs */

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	struct qp *qp;

	if (init->qp_type != IBV_QPT_RC || init->cap.max_send_sge > MOST_SGE || init->cap.max_recv_sge > MOST_SGE ||
	    init->cap.max_inline_data > MOST_INLINE) {
		errno = EINVAL;
		return NULL;
	}
	pthread_mutex_lock(&lock);
	for (int i = 0; i < MOST_QPS; i++) {
		if (qps[i])
			continue;
		qp = calloc(1, sizeof(*qp));
		qp->base = (struct ibv_qp){.context = pd->context,
					   .pd = pd,
					   .send_cq = init->send_cq,
					   .recv_cq = init->recv_cq,
					   .qp_type = IBV_QPT_RC,
					   .qp_num = 0x100 + i + (qp_lives[i]++ % 16) * MOST_QPS};
		qp->cap = init->cap;
		qp->sends = calloc(qp->cap.max_send_wr, sizeof(*qp->sends));
		qp->receives = calloc(qp->cap.max_recv_wr, sizeof(*qp->receives));
		qps[i] = qp;
		if (qps_used <= i)
			qps_used = i + 1;
		((struct pd *)pd)->users++;
		((struct cq *)init->send_cq)->users++;
		((struct cq *)init->recv_cq)->users++;
		pthread_mutex_unlock(&lock);
		return &qp->base;
	}
	pthread_mutex_unlock(&lock);
	errno = ENOMEM;
	return NULL;
}

static struct qp *find(uint32_t number)
{
	struct qp *qp = qps[(number - 0x100) % MOST_QPS];

	return qp && qp->base.qp_num == number ? qp : NULL;
}

static void event(struct qp *qp, enum ibv_event_type type)
{
	struct ibv_async_event event = {.element.qp = &qp->base, .event_type = type};
	struct card *card = card_of(qp->base.context);

	if (write(card->events[1], &event, sizeof(event)) != sizeof(event))
		broken("too many events");
}

/* Of one partition, of which at least one is a full member. */
static int hears(struct qp *one, struct qp *other)
{
	uint16_t a = partitions[one->attr.pkey_index], b = partitions[other->attr.pkey_index];

	return (a & 0x7fff) == (b & 0x7fff) && (a | b) & 0x8000;
}

static void happen(struct qp *qp, uint32_t what)
{
	struct card *card = card_of(qp->base.context);
	struct ibv_async_event event = {.event_type = what & 0xfff, .element.port_num = working_port(qp->base.context)};

	/* Of another one. */
	if (what & 0x1000)
		event.element.port_num = 3 - event.element.port_num;

	if (what & 0x2000) {
		gids_gone = !gids_gone;
		for (int i = 0; i < gid_count; i++)
			gids[i].gid_type = IBV_GID_TYPE_ROCE_V1;
	}
	if (what & 0x4000)
		gids_unread = 2;
	if (what & 0x8000)
		pkeys_unread = 1;
	if (event.event_type == IBV_EVENT_PORT_ERR)
		port1.state = IBV_PORT_DOWN;
	else if (event.event_type == IBV_EVENT_PORT_ACTIVE)
		port1.state = IBV_PORT_ACTIVE;
	else if (event.event_type == IBV_EVENT_LID_CHANGE && event.element.port_num == working_port(qp->base.context))
		port1.lid++;
	else if (event.event_type == IBV_EVENT_PKEY_CHANGE)
		partitions[2] ^= 0x8001;
	else if (event.event_type == IBV_EVENT_DEVICE_FATAL) {
		card->gone = 1;
		gids_unread = 2;
		away[card->verbs.context.device - devices] = 3;
		went[card->verbs.context.device - devices] = 1;
	}
	if (write(card->events[1], &event, sizeof(event)) != sizeof(event))
		broken("too many events");
}

static void send_completion(struct qp *qp, struct send *send, enum ibv_wc_status status, uint32_t length)
{
	static const enum ibv_wc_opcode opcodes[] = {
		[IBV_WR_RDMA_WRITE] = IBV_WC_RDMA_WRITE, [IBV_WR_RDMA_WRITE_WITH_IMM] = IBV_WC_RDMA_WRITE,
		[IBV_WR_SEND] = IBV_WC_SEND,		 [IBV_WR_SEND_WITH_IMM] = IBV_WC_SEND,
		[IBV_WR_RDMA_READ] = IBV_WC_RDMA_READ,	 [IBV_WR_ATOMIC_CMP_AND_SWP] = IBV_WC_COMP_SWAP,
		[IBV_WR_ATOMIC_FETCH_AND_ADD] = IBV_WC_FETCH_ADD};

	if (status || send->wr.send_flags & IBV_SEND_SIGNALED) {
		struct ibv_wc wc = {.wr_id = send->wr.wr_id,
				    .status = status,
				    .opcode = opcodes[send->wr.opcode],
				    .byte_len = length,
				    .vendor_err = status ? 0x77 : 0,
				    .qp_num = qp->base.qp_num};

		complete((struct cq *)qp->base.send_cq, wc);
	}
	qp->send_head = (qp->send_head + 1) % qp->cap.max_send_wr;
	qp->send_count--;
}

static void receive_completion(struct qp *qp, struct ibv_wc wc)
{
	wc.wr_id = qp->receives[qp->receive_head].wr_id;
	wc.qp_num = qp->base.qp_num;
	complete((struct cq *)qp->base.recv_cq, wc);
	qp->receive_head = (qp->receive_head + 1) % qp->cap.max_recv_wr;
	qp->receive_count--;
}

static void fail(struct qp *qp)
{
	qp->base.state = IBV_QPS_ERR;
	while (qp->send_count)
		send_completion(qp, &qp->sends[qp->send_head], IBV_WC_WR_FLUSH_ERR, 0);
	while (qp->receive_count)
		receive_completion(qp, (struct ibv_wc){.status = IBV_WC_WR_FLUSH_ERR, .opcode = IBV_WC_RECV});
}

static uint32_t length_of(const struct ibv_sge *sges, int count)
{
	uint32_t length = 0;

	for (int i = 0; i < count; i++)
		length += sges[i].length;
	return length;
}

/* Copies between a list and memory; 0 if the list is not what it says. */
static int transfer(struct ibv_pd *pd, const struct ibv_sge *sges, int count, uint8_t *memory, uint32_t length, int scatter)
{
	for (int i = 0; i < count && length; i++) {
		uint32_t step = sges[i].length < length ? sges[i].length : length;
		uint8_t *at = reach(sges[i].lkey, pd, sges[i].addr, step, scatter ? IBV_ACCESS_LOCAL_WRITE : 0, 0);

		if (!at)
			return 0;
		if (scatter)
			memmove(at, memory, step);
		else
			memmove(memory, at, step);
		memory += step;
		length -= step;
	}
	return 1;
}

/* As below, whatever it is. */
static int carry_out_any(struct qp *qp)
{
	struct send *send = &qp->sends[qp->send_head];
	struct ibv_send_wr *wr = &send->wr;
	struct qp *peer = find(qp->attr.dest_qp_num);
	int is_inline = wr->send_flags & IBV_SEND_INLINE;
	uint32_t length = is_inline ? wr->sg_list->length : length_of(send->sges, wr->num_sge);
	uint8_t *data = is_inline ? send->data : malloc(length + 1), *remote = NULL;
	int takes = wr->opcode == IBV_WR_SEND || wr->opcode == IBV_WR_SEND_WITH_IMM || wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	enum ibv_wc_status status = IBV_WC_SUCCESS, theirs = IBV_WC_SUCCESS;
	unsigned int right = 0;
	uint64_t old;

	if (!peer || peer->base.state < IBV_QPS_RTR || peer->base.state > IBV_QPS_SQD ||
	    peer->attr.dest_qp_num != qp->base.qp_num || !hears(qp, peer)) {
		status = IBV_WC_RETRY_EXC_ERR;
		goto done;
	}
	if (wr->opcode == IBV_WR_RDMA_WRITE || wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM)
		right = IBV_ACCESS_REMOTE_WRITE;
	else if (wr->opcode == IBV_WR_RDMA_READ)
		right = IBV_ACCESS_REMOTE_READ;
	else if (!takes)
		right = IBV_ACCESS_REMOTE_ATOMIC;
	if (!is_inline && (right == 0 || right == IBV_ACCESS_REMOTE_WRITE) &&
	    !transfer(qp->base.pd, send->sges, wr->num_sge, data, length, 0)) {
		status = IBV_WC_LOC_PROT_ERR;
		goto done;
	}
	if (right && (length || right != IBV_ACCESS_REMOTE_WRITE)) {
		uint64_t addr = right == IBV_ACCESS_REMOTE_ATOMIC ? wr->wr.atomic.remote_addr : wr->wr.rdma.remote_addr;
		uint32_t rkey = right == IBV_ACCESS_REMOTE_ATOMIC ? wr->wr.atomic.rkey : wr->wr.rdma.rkey;

		if (right == IBV_ACCESS_REMOTE_ATOMIC && addr & 7) {
			status = IBV_WC_REM_INV_REQ_ERR;
			theirs = IBV_WC_REM_INV_REQ_ERR;
			goto done;
		}
		remote = length || right == IBV_ACCESS_REMOTE_ATOMIC ? reach(rkey, peer->base.pd, addr, length, right, 1) : data;
		if (!remote || !(peer->attr.qp_access_flags & right)) {
			status = IBV_WC_REM_ACCESS_ERR;
			theirs = IBV_WC_REM_ACCESS_ERR;
			goto done;
		}
	}
	if (takes && !peer->receive_count) {
		if (qp->attr.rnr_retry == 7) {
			if (!is_inline)
				free(data);
			return 0;
		}
		status = IBV_WC_RNR_RETRY_EXC_ERR;
		goto done;
	}
	switch (right) {
	case IBV_ACCESS_REMOTE_WRITE:
		memmove(remote, data, length);
		break;
	case IBV_ACCESS_REMOTE_READ:
		memmove(data, remote, length);
		break;
	case IBV_ACCESS_REMOTE_ATOMIC:
		old = *(uint64_t *)remote;
		if (wr->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD)
			*(uint64_t *)remote = old + wr->wr.atomic.compare_add;
		else if (old == wr->wr.atomic.compare_add)
			*(uint64_t *)remote = wr->wr.atomic.swap;
		memcpy(data, &old, 8);
		break;
	}
	if ((right == IBV_ACCESS_REMOTE_READ || right == IBV_ACCESS_REMOTE_ATOMIC) &&
	    !transfer(qp->base.pd, send->sges, wr->num_sge, data, length, 1)) {
		status = IBV_WC_LOC_PROT_ERR;
		goto done;
	}
	if (takes) {
		struct receive *receive = &peer->receives[peer->receive_head];
		struct ibv_wc wc = {.opcode = right ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV,
				    .byte_len = length,
				    .src_qp = qp->base.qp_num};

		if (wr->opcode != IBV_WR_SEND) {
			wc.wc_flags = IBV_WC_WITH_IMM;
			wc.imm_data = wr->imm_data;
		}
		if (!right && length > length_of(receive->sges, receive->count)) {
			wc.status = IBV_WC_LOC_LEN_ERR;
			status = IBV_WC_REM_INV_REQ_ERR;
		} else if (!right && !transfer(peer->base.pd, receive->sges, receive->count, data, length, 1)) {
			wc.status = IBV_WC_LOC_PROT_ERR;
			status = IBV_WC_REM_OP_ERR;
		}
		receive_completion(peer, wc);
		if (wc.status)
			fail(peer);
	}
done:
	if (!is_inline)
		free(data);
	if (theirs) {
		event(peer, theirs == IBV_WC_REM_ACCESS_ERR ? IBV_EVENT_QP_ACCESS_ERR : IBV_EVENT_QP_REQ_ERR);
		fail(peer);
	}
	if (!status && wr->opcode == IBV_WR_RDMA_WRITE_WITH_IMM && ntohl(wr->imm_data) >> 16 == 0xeeee)
		happen(qp, ntohl(wr->imm_data) & 0xffff);
	if (qp->base.state == IBV_QPS_RTS) {
		send_completion(qp, send, status, status ? 0 : length);
		if (status)
			fail(qp);
	}
	return 1;
}

/* A WRITE from one place that is as it should be, which is what is measured; else 0. */
static int write_at_once(struct qp *qp, struct send *send)
{
	struct ibv_send_wr *wr = &send->wr;
	struct qp *peer = find(qp->attr.dest_qp_num);
	int is_inline = wr->send_flags & IBV_SEND_INLINE;
	uint32_t length = wr->sg_list->length;
	uint8_t *from, *to;

	if (wr->opcode != IBV_WR_RDMA_WRITE || wr->num_sge != 1 || !length || !peer || peer->base.state < IBV_QPS_RTR ||
	    peer->base.state > IBV_QPS_SQD || peer->attr.dest_qp_num != qp->base.qp_num || !hears(qp, peer) ||
	    !(peer->attr.qp_access_flags & IBV_ACCESS_REMOTE_WRITE))
		return 0;
	from = is_inline ? send->data : reach(wr->sg_list->lkey, qp->base.pd, wr->sg_list->addr, length, 0, 0);
	to = reach(wr->wr.rdma.rkey, peer->base.pd, wr->wr.rdma.remote_addr, length, IBV_ACCESS_REMOTE_WRITE, 1);
	if (!from || !to)
		return 0;
	memmove(to, from, length);
	send_completion(qp, send, IBV_WC_SUCCESS, length);
	return 1;
}

/* One request. 0 if it waits for a receive request; otherwise 1, and it is completed. */
static int carry_out(struct qp *qp)
{
	if (qp->send_count && write_at_once(qp, &qp->sends[qp->send_head]))
		return 1;
	return carry_out_any(qp);
}

/* All that can be. One in error takes no receive requests any more: who waits for one gives up. */
static void pump(struct qp *qp)
{
	struct qp *peer;

	if (card_of(qp->base.context)->late)
		return;
	while (!is_gone(qp) && qp->base.state == IBV_QPS_RTS && qp->send_count && carry_out(qp)) {
	}
	if (qp->base.state != IBV_QPS_ERR)
		return;
	peer = find(qp->attr.dest_qp_num);
	if (peer && peer->base.state == IBV_QPS_RTS)
		pump(peer);
}

/* Of a queue pair that is gone, or as good as that. */
static void pump_peer(uint32_t number)
{
	struct qp *peer = find(number);

	if (peer)
		pump(peer);
}

static int post_send(struct ibv_qp *base, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct qp *qp = (struct qp *)base;
	int error = 0;

	if (is_gone(qp)) {
		*bad = wr;
		return EIO;
	}
	pthread_mutex_lock(&lock);
	for (; wr && !error; wr = wr->next) {
		struct send *send;

		*bad = wr;
		if (qp->base.state < IBV_QPS_RTS || wr->num_sge > (int)qp->cap.max_send_sge ||
		    (qp->base.context->device == &devices[PACED] && qp->rate != PACE)) {
			error = EINVAL;
			break;
		}
		if (qp->base.context->device == &devices[DRAINING] && wr->opcode == IBV_WR_ATOMIC_FETCH_AND_ADD &&
		    wr->wr.atomic.remote_addr % 8) {
			error = -EINVAL;
			break;
		}
		if (qp->send_count == qp->cap.max_send_wr)
			broken("a send queue is overrun");
		send = &qp->sends[(qp->send_head + qp->send_count++) % qp->cap.max_send_wr];
		send->wr = *wr;
		send->wr.sg_list = send->sges;
		memcpy(send->sges, wr->sg_list, wr->num_sge * sizeof(*wr->sg_list));
		if (wr->send_flags & IBV_SEND_INLINE) {
			if (wr->num_sge != 1 || wr->sg_list->length > qp->cap.max_inline_data)
				broken("more inline data than was asked for");
			memcpy(send->data, (void *)(uintptr_t)wr->sg_list->addr, wr->sg_list->length);
		}
		if (qp->base.state == IBV_QPS_ERR)
			fail(qp);
		else
			pump(qp);
	}
	pthread_mutex_unlock(&lock);
	return error;
}

static int post_recv(struct ibv_qp *base, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	struct qp *qp = (struct qp *)base, *peer;
	int error = 0;

	pthread_mutex_lock(&lock);
	for (; wr; wr = wr->next) {
		struct receive *receive;

		*bad = wr;
		if (qp->base.state == IBV_QPS_RESET || wr->num_sge > (int)qp->cap.max_recv_sge) {
			error = EINVAL;
			break;
		}
		if (qp->receive_count == qp->cap.max_recv_wr)
			broken("a receive queue is overrun");
		receive = &qp->receives[(qp->receive_head + qp->receive_count++) % qp->cap.max_recv_wr];
		receive->wr_id = wr->wr_id;
		receive->count = wr->num_sge;
		memcpy(receive->sges, wr->sg_list, wr->num_sge * sizeof(*wr->sg_list));
	}
	if (qp->base.state == IBV_QPS_ERR)
		fail(qp);
	else if ((peer = find(qp->attr.dest_qp_num)))
		pump(peer);
	pthread_mutex_unlock(&lock);
	return error;
}

static int modify_qp_rate_limit(struct ibv_qp *base, struct ibv_qp_rate_limit_attr *attr)
{
	if (base->state != IBV_QPS_RTS || attr->max_burst_sz || attr->typical_pkt_sz || attr->comp_mask)
		return EINVAL;
	((struct qp *)base)->rate = attr->rate_limit;
	return 0;
}

static int may_go(enum ibv_qp_state from, enum ibv_qp_state to)
{
	if (to == IBV_QPS_RESET || to == IBV_QPS_ERR)
		return 1;
	if (from == IBV_QPS_SQD)
		return to == IBV_QPS_SQD || to == IBV_QPS_RTS;
	if (to == IBV_QPS_SQD)
		return from == IBV_QPS_RTS;
	return to == from ? from != IBV_QPS_RESET : to == from + 1 && to <= IBV_QPS_RTS;
}

/* It takes what only a drained one takes when somebody has looked; draining0 takes it, and goes on if it is taken for one in RTS. */
static bool is_held_up(struct qp *qp, enum ibv_qp_state from, enum ibv_qp_state to, int mask)
{
	if (qp->base.state != IBV_QPS_SQD || !qp->draining || to == IBV_QPS_ERR || to == IBV_QPS_RESET)
		return false;
	return qp->base.context->device != &devices[DRAINING] || (mask & IBV_QP_STATE && from == IBV_QPS_SQD);
}

int ibv_modify_qp(struct ibv_qp *base, struct ibv_qp_attr *attr, int mask)
{
	struct qp *qp = (struct qp *)base;
	enum ibv_qp_state from = mask & IBV_QP_CUR_STATE ? attr->cur_qp_state : base->state;
	enum ibv_qp_state to = mask & IBV_QP_STATE ? attr->qp_state : base->state;
	int known = 0;

	if (is_gone(qp))
		return EIO;
	pthread_mutex_lock(&lock);
	if (base->context->device == &devices[UNDRAINED] && to == IBV_QPS_SQD)
		to = -1;
	if (!may_go(from, to) || is_held_up(qp, from, to, mask) ||
	    (base->state == IBV_QPS_RTS && mask & ~(IBV_QP_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER)) ||
	    (mask & IBV_QP_PORT && attr->port_num != working_port(base->context)) ||
	    (mask & IBV_QP_PKEY_INDEX && attr->pkey_index >= partition_count(base->context))) {
		pthread_mutex_unlock(&lock);
		return EINVAL;
	}
	if (mask & IBV_QP_AV) {
		for (int i = 0; i < gid_count; i++)
			known |= gids[i].gid_index == attr->ah_attr.grh.sgid_index;
		if (!attr->ah_attr.is_global || !known || attr->ah_attr.port_num != working_port(base->context)) {
			pthread_mutex_unlock(&lock);
			return EINVAL;
		}
	}
	if (mask & IBV_QP_AV && base->context->device == &devices[ELSEWHERE]) {
		pthread_mutex_unlock(&lock);
		return ENODEV;
	}
	if (mask & IBV_QP_AV && base->context->device == &devices[MARKED] &&
	    (attr->ah_attr.sl != 3 || attr->ah_attr.grh.traffic_class != 104)) {
		pthread_mutex_unlock(&lock);
		return EINVAL;
	}
	if (mask & IBV_QP_ACCESS_FLAGS)
		qp->attr.qp_access_flags = attr->qp_access_flags;
	if (mask & IBV_QP_PKEY_INDEX)
		qp->attr.pkey_index = attr->pkey_index;
	if (mask & IBV_QP_DEST_QPN)
		qp->attr.dest_qp_num = attr->dest_qp_num;
	if (mask & IBV_QP_RNR_RETRY)
		qp->attr.rnr_retry = attr->rnr_retry;
	if (to == IBV_QPS_SQD && mask & IBV_QP_STATE) {
		if (qp->send_count)
			broken("a queue pair is to drain that has something to send");
		qp->draining = 1;
	}
	if (to == IBV_QPS_ERR) {
		fail(qp);
		pump(qp);
	} else {
		base->state = to;
		/* As a card: what it had is forgotten, what it completed is still there. */
		if (to == IBV_QPS_RESET) {
			uint32_t peer = qp->attr.dest_qp_num;

			qp->send_count = qp->receive_count = qp->rate = 0;
			memset(&qp->attr, 0, sizeof(qp->attr));
			pump_peer(peer);
		}
	}
	pthread_mutex_unlock(&lock);
	return 0;
}

int ibv_query_qp(struct ibv_qp *base, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init)
{
	struct qp *qp = (struct qp *)base;

	(void)mask;
	(void)init;
	pthread_mutex_lock(&lock);
	attr->sq_draining = base->state == IBV_QPS_SQD && qp->draining;
	if (base->context->device != &devices[DRAINING])
		qp->draining = 0;
	attr->qp_state = attr->cur_qp_state = base->state;
	pthread_mutex_unlock(&lock);
	return 0;
}

int ibv_destroy_qp(struct ibv_qp *base)
{
	struct qp *qp = (struct qp *)base;

	pthread_mutex_lock(&lock);
	qps[(base->qp_num - 0x100) % MOST_QPS] = NULL;
	((struct pd *)base->pd)->users--;
	((struct cq *)base->send_cq)->users--;
	((struct cq *)base->recv_cq)->users--;
	pump_peer(qp->attr.dest_qp_num);
	pthread_mutex_unlock(&lock);
	free(qp->sends);
	free(qp->receives);
	free(qp);
	return 0;
}
