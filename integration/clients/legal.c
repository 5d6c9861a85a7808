/*
 * What a device answers to every flag, mask and limit: a table, to be compared with that of the kernel's own driver.
 *
 *   legal      prints a line for each question: the question, and the answer behind a tab
 */
#include "legal.h"

#include <fcntl.h>
#include <stdarg.h>
#include <sys/mman.h>

struct ibv_context *context;
struct ibv_pd *pd;
struct ibv_cq *cq;
struct ibv_device_attr device;
struct ibv_port_attr port;
int gid_index;
union ibv_gid gid;
unsigned char *memory;
struct ibv_mr *mr;

const char *name_of(int error)
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

void say(const char *answer, const char *question, ...)
{
	va_list list;

	va_start(list, question);
	vprintf(question, list);
	va_end(list);
	printf("\t%s\n", answer);
	fflush(stdout);
}

int code(int result)
{
	return result < 0 ? errno : result;
}

int made(void *object)
{
	return object ? 0 : errno;
}

void add(struct answers *to, unsigned value, int answer)
{
	CHECK(to->count < 64);
	to->value[to->count] = value;
	to->answer[to->count++] = answer;
}

void say_all(const struct answers *all, const char *question)
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
