/*
 * What a program sees of events of the port and of the card, and of a card that goes and comes back; on a card of provider.c, which does
 * as it is told by immediate data.
 *
 *   absence port DIRECTORY   events of the port reach every context once, and its attributes follow, as do its files in DIRECTORY
 *   absence fatal            what was under way is flushed in order; new contexts work when the card is back, old objects never
 *   absence queue            the same where a completion queue of the card's breaks
 *   absence another          the same events, and what comes back by the card's name is another card, which is left alone
 *   absence drain SOCKET     the same for a card that the operator has given up, by the proxy's socket, until he says so
 *   absence removed          says "ready", and is busy until somebody takes the card away; the same then. For any card.
 *   absence works            the device is there, at the latest soon
 */
#include "sides.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { OTHER_PORT = 0x1000, GIDS_GO = 0x2000, GIDS_UNREAD = 0x4000, UNDER_WAY = 24, RECEIVES = 8 };

static struct ibv_context *open_context(void)
{
	int count;
	struct ibv_device **list = ibv_get_device_list(&count);
	struct ibv_context *context;

	CHECK(list && count == 1, "%d devices", count);
	context = ibv_open_device(list[0]);
	ibv_free_device_list(list);
	return context;
}

/* The next event within `ms`, or -1; it must be of port 1. */
static int next(struct ibv_context *context, int ms)
{
	struct pollfd fd = {.fd = context->async_fd, .events = POLLIN};
	struct ibv_async_event event;

	if (poll(&fd, 1, ms) != 1)
		return -1;
	CHECK_EQ(ibv_get_async_event(context, &event), 0);
	if (event.event_type != IBV_EVENT_DEVICE_FATAL)
		CHECK_EQ(event.element.port_num, 1);
	ibv_ack_async_event(&event);
	return (int)event.event_type;
}

static struct send happens(uint64_t wr_id, unsigned what, struct region a, struct region b)
{
	struct send send = rdma(IBV_WR_RDMA_WRITE_WITH_IMM, wr_id, a, 0, 8, b, 0);

	send.imm = htonl(0xeeee0000 | what);
	return send;
}

static struct ibv_port_attr port_of(struct ibv_context *context)
{
	struct ibv_port_attr port;

	CHECK_EQ(ibv_query_port(context, 1, &port), 0);
	return port;
}

/* A port's file says this, without its end of line. */
static void says(const char *directory, const char *name, const char *expected)
{
	char path[4096], line[256] = "";
	FILE *file;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	file = fopen(path, "r");
	CHECK(file, "%s: errno %d", path, errno);
	if (fgets(line, sizeof(line), file))
		line[strcspn(line, "\n")] = 0;
	fclose(file);
	CHECK(!strcmp(line, expected), "%s says \"%s\", not \"%s\"", path, line, expected);
}

static void says_gid(const char *directory, union ibv_gid gid, const char *kind)
{
	char text[64] = "";

	for (int i = 0; i < 16; i += 2)
		snprintf(text + strlen(text), sizeof(text) - strlen(text), "%s%02x%02x", i ? ":" : "", gid.raw[i],
			 gid.raw[i + 1]);
	says(directory, "gids/0", text);
	says(directory, "gid_attrs/types/0", kind);
}

static union ibv_gid first_gid(struct ibv_context *context)
{
	union ibv_gid gid;

	CHECK_EQ(ibv_query_gid(context, 1, 0, &gid), 0);
	return gid;
}

/*
 * The card's table loses what was in it, which comes back of another kind. At first it cannot be read. That a program asks for it all the
 * time, the first time, takes nothing away from the event.
 */
static void gids_change(struct pair *p, struct ibv_context *context, const char *directory, struct region a,
			struct region b)
{
	static const union ibv_gid none;
	union ibv_gid gid = first_gid(context);

	CHECK(memcmp(&gid, &none, sizeof(gid)), "there is no GID");
	says_gid(directory, gid, "RoCE v2");
	for (int back = 0; back < 2; back++) {
		side_recv(p->b, p->qb, 0, b, 0, 64);
		side_post(p->a, p->qa, happens(0, IBV_EVENT_GID_CHANGE | GIDS_GO | GIDS_UNREAD, a, b));
		int event = -1;
		for (int ms = 0; event < 0 && ms < 5000; ms++) {
			if (!back)
				first_gid(context);
			event = next(context, 1);
		}
		CHECK_EQ(event, IBV_EVENT_GID_CHANGE);
		says_gid(directory, back ? gid : none, back ? "IB/RoCE v1" : "RoCE v2");
		union ibv_gid now = first_gid(context);
		CHECK(!memcmp(&now, back ? &gid : &none, sizeof(now)), "round %d", back);
	}
}

static void port_events(const char *directory)
{
	static const int relayed[] = {IBV_EVENT_PORT_ERR,	IBV_EVENT_PORT_ACTIVE, IBV_EVENT_LID_CHANGE,
				      IBV_EVENT_SM_CHANGE,	IBV_EVENT_CLIENT_REREGISTER};
	struct ibv_context *contexts[2] = {open_context(), open_context()};
	struct pair p = {0};
	uint64_t number = 0;

	CHECK(contexts[0] && contexts[1], "errno %d", errno);
	open_sides(&p, false);
	connect_pair(&p, link_defaults);
	struct region a = side_reg(p.a, 0, 4096, link_defaults.access), b = side_reg(p.b, 0, 4096, link_defaults.access);
	int lid = port_of(contexts[0]).lid;
	for (size_t i = 0; i < sizeof relayed / sizeof *relayed; i++) {
		side_recv(p.b, p.qb, number, b, 0, 64);
		/* Of a port that is not shown nobody hears, nor of a table of GIDs or P_Keys that is as it was. */
		side_recv(p.b, p.qb, number, b, 0, 64);
		side_recv(p.b, p.qb, number, b, 0, 64);
		side_recv(p.b, p.qb, number, b, 0, 64);
		side_post(p.a, p.qa, happens(number, (unsigned)relayed[i] | OTHER_PORT, a, b));
		side_post(p.a, p.qa, happens(number, IBV_EVENT_GID_CHANGE, a, b));
		side_post(p.a, p.qa, happens(number, IBV_EVENT_PKEY_CHANGE, a, b));
		side_post(p.a, p.qa, happens(number, (unsigned)relayed[i], a, b));
		for (int c = 0; c < 2; c++)
			CHECK_EQ(next(contexts[c], 5000), relayed[i]);
		CHECK_EQ(port_of(contexts[1]).state,
			 relayed[i] == IBV_EVENT_PORT_ERR ? IBV_PORT_DOWN : IBV_PORT_ACTIVE);
		says(directory, "state", relayed[i] == IBV_EVENT_PORT_ERR ? "1: DOWN" : "4: ACTIVE");
		says(directory, "phys_state", relayed[i] == IBV_EVENT_PORT_ERR ? "3: Disabled" : "5: LinkUp");
		says(directory, "rate", relayed[i] == IBV_EVENT_PORT_ERR ? "2.5 Gb/sec (1X SDR)" : "100 Gb/sec (4X EDR)");
		number++;
	}
	CHECK_EQ(port_of(contexts[0]).lid, lid + 1);
	char expected[16];
	snprintf(expected, sizeof(expected), "0x%x", lid + 1);
	says(directory, "lid", expected);
	gids_change(&p, contexts[0], directory, a, b);
	CHECK_EQ(next(contexts[1], 5000), IBV_EVENT_GID_CHANGE);
	CHECK_EQ(next(contexts[1], 5000), IBV_EVENT_GID_CHANGE);
	for (int c = 0; c < 2; c++)
		CHECK_EQ(next(contexts[c], 200), -1);
}

static void say(const char *path, const char *word)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	char answer[16] = "";

	strncpy(address.sun_path, path, sizeof(address.sun_path) - 1);
	CHECK(fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) == 0, "%s: errno %d", path, errno);
	CHECK(send(fd, word, strlen(word), 0) == (ssize_t)strlen(word), "send");
	CHECK(recv(fd, answer, sizeof(answer) - 1, 0) > 0 && !strcmp(answer, "done"), "the proxy says \"%s\"", answer);
	close(fd);
}

/* Opens the device when it is there, within a minute. */
static struct ibv_context *open_again(void)
{
	const struct timespec pause = {.tv_nsec = 20000000};

	for (int tries = 0; tries < 3000; tries++) {
		struct ibv_context *context = open_context();

		if (context)
			return context;
		CHECK_EQ(errno, EIO);
		nanosleep(&pause, NULL);
	}
	CHECK(false, "the device does not come back");
	return NULL;
}

static void works(void)
{
	struct pair p = {0};

	open_sides(&p, false);
	connect_pair(&p, link_defaults);
	struct region a = side_reg(p.a, 0, 4096, link_defaults.access), b = side_reg(p.b, 0, 4096, link_defaults.access);
	side_post(p.a, p.qa, rdma(IBV_WR_RDMA_WRITE, 7, a, 0, 64, b, 64));
	side_wc(p.a, SEND_CQ, 7, IBV_WC_SUCCESS);
}

static void goes(const char *operated)
{
	struct ibv_context *bystander = open_context();
	struct pair p = {0};
	struct region unused;
	struct ibv_wc wc;
	int failed = 0;

	CHECK(bystander, "errno %d", errno);
	open_sides(&p, false);
	connect_pair(&p, link_defaults);
	struct region a = side_reg(p.a, 0, ARENA_BYTES, link_defaults.access);
	struct region b = side_reg(p.b, 0, ARENA_BYTES, link_defaults.access);
	for (int i = 0; i < RECEIVES; i++)
		side_recv(p.b, p.qb, (uint64_t)i, b, 0, 64);
	if (!operated)
		side_post(p.a, p.qa, happens(1000, IBV_EVENT_DEVICE_FATAL, a, b));
	/* A card that is well carries everything out, but messages that nobody receives. */
	for (int i = 0; i < UNDER_WAY; i++)
		side_post(p.a, p.qa,
			  operated ? message((uint64_t)i, a, 0, 8)
				   : rdma(IBV_WR_RDMA_WRITE, (uint64_t)i, a, 0, 1 << 20, b, 4096));
	if (operated)
		say(operated, "drain");
	/* All in order; from the first that failed on, all. */
	for (int i = operated ? 0 : -1; i < UNDER_WAY; i++) {
		CHECK(side_poll(p.a, SEND_CQ, &wc, 1, 10000) == 1, "no completion of request %d", i);
		CHECK_EQ(wc.wr_id, i < 0 ? 1000 : (uint64_t)i);
		CHECK(wc.status == IBV_WC_SUCCESS ? !failed
		      : failed			  ? wc.status == IBV_WC_WR_FLUSH_ERR
						  : wc.status == IBV_WC_FATAL_ERR || wc.status == IBV_WC_WR_FLUSH_ERR,
		      "request %d: status %d after %d failed", i, wc.status, failed);
		failed += wc.status != IBV_WC_SUCCESS;
	}
	CHECK(failed > 0, "all requests have succeeded");
	failed = 0;
	for (int i = 0; i < RECEIVES; i++) {
		CHECK(side_poll(p.b, RECV_CQ, &wc, 1, 10000) == 1, "no completion of receive %d", i);
		CHECK_EQ(wc.wr_id, (uint64_t)i);
		CHECK(wc.status == IBV_WC_SUCCESS ? !failed : wc.status == IBV_WC_WR_FLUSH_ERR, "receive %d: status %d", i,
		      wc.status);
		failed += wc.status != IBV_WC_SUCCESS;
	}
	CHECK(operated || failed >= RECEIVES - 1, "receives succeed");
	CHECK_EQ(next(bystander, 5000), IBV_EVENT_DEVICE_FATAL);
	CHECK_EQ(side_state(p.a, p.qa), IBV_QPS_ERR);
	CHECK_EQ(side_state(p.b, p.qb), IBV_QPS_ERR);
	if (operated) {
		const struct timespec while_away = {.tv_sec = 1};

		/* The card is there all the time, and is left alone. */
		nanosleep(&while_away, NULL);
		CHECK(!open_context(), "the device can be opened");
		CHECK_EQ(errno, EIO);
		say(operated, "resume");
	}
	CHECK(open_again(), "errno %d", errno);
	works();
	CHECK_EQ(to_state(p.a, p.qa, IBV_QPS_RESET), EIO);
	CHECK_EQ(side_try_reg(p.a, 0, 4096, 0, &unused), EIO);
	CHECK_EQ(side_dereg(p.a, a), 0);
	CHECK_EQ(side_destroy_qp(p.a, p.qa), 0);
	CHECK_EQ(side_destroy_qp(p.b, p.qb), 0);
	works();
	CHECK_EQ(next(bystander, 200), -1);
}

/* The card is there again: new objects work, and the pair's stay dead. */
static void comes_back(struct pair *p)
{
	CHECK(open_again(), "errno %d", errno);
	works();
	CHECK_EQ(to_state(p->a, p->qa, IBV_QPS_RESET), EIO);
	CHECK_EQ(side_destroy_qp(p->a, p->qa), 0);
	works();
}

/* This event ends the pair that it makes. */
static void breaks(struct pair *p, unsigned event)
{
	struct ibv_context *bystander = open_context();

	CHECK(bystander, "errno %d", errno);
	open_sides(p, false);
	connect_pair(p, link_defaults);
	struct region a = side_reg(p->a, 0, 4096, link_defaults.access), b = side_reg(p->b, 0, 4096, link_defaults.access);
	side_recv(p->b, p->qb, 0, b, 0, 64);
	side_post(p->a, p->qa, happens(0, event, a, b));
	CHECK_EQ(next(bystander, 5000), IBV_EVENT_DEVICE_FATAL);
	CHECK_EQ(side_state(p->a, p->qa), IBV_QPS_ERR);
	CHECK_EQ(side_state(p->b, p->qb), IBV_QPS_ERR);
}

static void queue_breaks(void)
{
	struct pair p = {0};

	breaks(&p, IBV_EVENT_CQ_ERR);
	comes_back(&p);
}

static void another_comes(void)
{
	const struct timespec pause = {.tv_nsec = 100000000};
	struct pair p = {0};

	breaks(&p, IBV_EVENT_DEVICE_FATAL);
	/* It is there after some 1.5 s. */
	for (int tries = 0; tries < 45; tries++) {
		CHECK(!open_context(), "another card is the container's");
		CHECK_EQ(errno, EIO);
		nanosleep(&pause, NULL);
	}
}

static void removed(void)
{
	enum { DEEP = 16 };
	struct ibv_context *bystander = open_context();
	uint64_t posted = 0, completed = 0, failed = 0;
	struct pair p = {0};
	struct ibv_wc wc;

	CHECK(bystander, "errno %d", errno);
	open_sides(&p, false);
	connect_pair(&p, link_defaults);
	struct region a = side_reg(p.a, 0, ARENA_BYTES, link_defaults.access);
	struct region b = side_reg(p.b, 0, ARENA_BYTES, link_defaults.access);
	printf("ready\n");
	fflush(stdout);
	while (completed < posted || !failed) {
		for (; !failed && posted - completed < DEEP; posted++)
			side_post(p.a, p.qa, rdma(IBV_WR_RDMA_WRITE, posted, a, 0, 64 << 10, b, 0));
		CHECK(side_poll(p.a, SEND_CQ, &wc, 1, 60000) == 1, "no completion of request %lu", (unsigned long)completed);
		CHECK_EQ(wc.wr_id, completed);
		CHECK(!failed || wc.status == IBV_WC_WR_FLUSH_ERR, "%s", ibv_wc_status_str(wc.status));
		failed += wc.status != IBV_WC_SUCCESS;
		completed++;
	}
	CHECK_EQ(next(bystander, 10000), IBV_EVENT_DEVICE_FATAL);
	CHECK_EQ(side_state(p.a, p.qa), IBV_QPS_ERR);
	comes_back(&p);
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "port"))
		port_events(argv[2]);
	else if (argc == 2 && !strcmp(argv[1], "fatal"))
		goes(NULL);
	else if (argc == 2 && !strcmp(argv[1], "queue"))
		queue_breaks();
	else if (argc == 2 && !strcmp(argv[1], "another"))
		another_comes();
	else if (argc == 2 && !strcmp(argv[1], "removed"))
		removed();
	else if (argc == 2 && !strcmp(argv[1], "works"))
		open_again(), works();
	else if (argc == 3 && !strcmp(argv[1], "drain"))
		goes(argv[2]);
	else
		return fprintf(stderr, "usage: see the head of absence.c\n"), 2;
	return 0;
}
