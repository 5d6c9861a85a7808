/*
 * What /sys says of the device is what its verbs say: found the way that NCCL, UCX and hwloc look, compared with the queries.
 *
 *   sysfs NAME
 *
 * Prints each GID that is not empty, with its interface, once all has been compared.
 */
#include "check.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <net/if.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <infiniband/verbs.h>

#define PATH 512

/* A file of the device's without the newline at its end. */
static void read_file(char *to, size_t size, const char *name, const char *file)
{
	char path[PATH];
	FILE *stream;
	size_t length;

	snprintf(path, sizeof(path), "/sys/class/infiniband/%s/%s", name, file);
	stream = fopen(path, "re");
	CHECK(stream, "%s: %s", path, strerror(errno));
	length = fread(to, 1, size - 1, stream);
	CHECK(!ferror(stream), "%s", path);
	fclose(stream);
	to[length] = 0;
	CHECK(!length || to[length - 1] == '\n', "%s: %s", path, to);
	if (length)
		to[length - 1] = 0;
}

static void expect(const char *name, const char *file, const char *expected)
{
	char found[256];

	read_file(found, sizeof(found), name, file);
	CHECK(!strcmp(found, expected), "%s: %s, but the verbs say %s", file, found, expected);
}

static const char *guid(char *to, uint64_t raw)
{
	const unsigned char *bytes = (const unsigned char *)&raw;

	sprintf(to, "%02x%02x:%02x%02x:%02x%02x:%02x%02x", bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5],
		bytes[6], bytes[7]);
	return to;
}

/* The one name in a directory, or NAME among others. */
static void only(const char *path, const char *prefix, const char *name)
{
	DIR *directory = opendir(path);
	struct dirent *entry;
	int found = 0;

	CHECK(directory, "%s: %s", path, strerror(errno));
	while ((entry = readdir(directory))) {
		if (entry->d_name[0] == '.' || strncmp(entry->d_name, prefix, strlen(prefix)))
			continue;
		CHECK(!strcmp(entry->d_name, name), "%s/%s is shown, too", path, entry->d_name);
		found++;
	}
	CHECK_EQ(found, 1);
	closedir(directory);
}

static void device(const char *name, struct ibv_context *context)
{
	struct ibv_device_attr attr;
	char text[64], path[PATH], real[PATH_MAX], device_path[PATH_MAX];
	const char *verbs = strrchr(context->device->dev_path, '/') + 1;

	CHECK_EQ(ibv_query_device(context, &attr), 0);
	expect(name, "node_guid", guid(text, attr.node_guid));
	expect(name, "sys_image_guid", guid(text, attr.sys_image_guid));
	expect(name, "fw_ver", attr.fw_ver);
	expect(name, "node_type", "1: CA");
	snprintf(text, sizeof(text), "%x", attr.hw_ver);
	expect(name, "hw_rev", text);

	/* NCCL takes the place of a card from here, and hwloc the NUMA node. */
	snprintf(path, sizeof(path), "/sys/class/infiniband/%s/device", name);
	CHECK(realpath(path, real), "%s: %s", path, strerror(errno));
	read_file(text, sizeof(text), name, "device/numa_node");
	CHECK(!strcmp(text, "-1"), "%s", text);

	/* The class entry is a link into a device's directory, which is below that. */
	CHECK(readlink(context->device->ibdev_path, path, sizeof(path)) > 0, "%s is no link", context->device->ibdev_path);
	CHECK(realpath(context->device->ibdev_path, device_path), "%s", strerror(errno));
	CHECK(!strncmp(device_path, real, strlen(real)), "%s is not below %s", device_path, real);
	snprintf(path, sizeof(path), "%s/device", context->device->dev_path);
	CHECK(realpath(path, device_path), "%s: %s", path, strerror(errno));
	CHECK(!strcmp(device_path, real), "%s", device_path);
	snprintf(path, sizeof(path), "%.200s/device/infiniband/%.64s/node_guid", context->device->dev_path, name);
	CHECK(!access(path, R_OK), "%s: %s", path, strerror(errno));

	snprintf(path, sizeof(path), "device/infiniband_verbs/%.32s/ibdev", verbs);
	expect(name, path, name);
	only("/sys/class/infiniband", "", name);
	only("/sys/class/infiniband_verbs", "uverbs", verbs);
}

static void port(const char *name, struct ibv_context *context)
{
	static const char *states[] = { "0: NOP", "1: DOWN", "2: INIT", "3: ARMED", "4: ACTIVE", "5: ACTIVE_DEFER" };
	struct ibv_port_attr attr;
	char text[64];
	uint16_t pkey;

	CHECK_EQ(ibv_query_port(context, 1, &attr), 0);
	expect(name, "ports/1/state", states[attr.state]);
	CHECK_EQ(attr.phys_state, 5);
	expect(name, "ports/1/phys_state", "5: LinkUp");
	CHECK_EQ(attr.link_layer, IBV_LINK_LAYER_ETHERNET);
	expect(name, "ports/1/link_layer", "Ethernet");
	snprintf(text, sizeof(text), "0x%x", attr.lid);
	expect(name, "ports/1/lid", text);
	snprintf(text, sizeof(text), "%u", attr.lmc);
	expect(name, "ports/1/lid_mask_count", text);
	snprintf(text, sizeof(text), "0x%x", attr.sm_lid);
	expect(name, "ports/1/sm_lid", text);
	snprintf(text, sizeof(text), "%u", attr.sm_sl);
	expect(name, "ports/1/sm_sl", text);
	snprintf(text, sizeof(text), "0x%08x", attr.port_cap_flags);
	expect(name, "ports/1/cap_mask", text);
	CHECK_EQ(attr.pkey_tbl_len, 1);
	CHECK_EQ(ibv_query_pkey(context, 1, 0, &pkey), 0);
	snprintf(text, sizeof(text), "0x%04x", ntohs(pkey));
	expect(name, "ports/1/pkeys/0", text);

	/* The devices of the tests: without a link, with one of 25 Gbit/s, with one of 10 Mbit/s. */
	read_file(text, sizeof(text), name, "ports/1/rate");
	switch (attr.active_width << 8 | attr.active_speed) {
	case 2 << 8 | 32:
		CHECK(!strcmp(text, "100 Gb/sec (4X EDR)"), "%s", text);
		break;
	case 1 << 8 | 32:
		CHECK(!strcmp(text, "25 Gb/sec (1X EDR)"), "%s", text);
		break;
	default:
		CHECK_EQ(attr.active_width << 8 | attr.active_speed, 1 << 8 | 1);
		CHECK(!strcmp(text, "2.5 Gb/sec (1X SDR)"), "%s", text);
	}
}

static void gids(const char *name, struct ibv_context *context)
{
	struct ibv_port_attr attr;
	struct ibv_gid_entry entry;
	char text[64], file[64], path[PATH];
	int i, j;

	CHECK_EQ(ibv_query_port(context, 1, &attr), 0);
	for (i = 0; i < attr.gid_tbl_len; i++) {
		union ibv_gid gid;
		char *to = text;

		CHECK_EQ(ibv_query_gid(context, 1, i, &gid), 0);
		for (j = 0; j < 16; j += 2)
			to += sprintf(to, "%s%02x%02x", j ? ":" : "", gid.raw[j], gid.raw[j + 1]);
		snprintf(file, sizeof(file), "ports/1/gids/%d", i);
		expect(name, file, text);
		snprintf(file, sizeof(file), "ports/1/gid_attrs/types/%d", i);
		expect(name, file, "RoCE v2");
		snprintf(file, sizeof(file), "ports/1/gid_attrs/ndevs/%d", i);
		if (ibv_query_gid_ex(context, 1, i, &entry, 0)) {
			/* As for an empty entry. */
			expect(name, file, "");
			continue;
		}
		CHECK_EQ(entry.gid_type, IBV_GID_TYPE_ROCE_V2);
		read_file(path, sizeof(path), name, file);
		CHECK_EQ(entry.ndev_ifindex, if_nametoindex(path));
		printf("%s %s\n", text, *path ? path : "-");
	}
	/* There are no more of them. */
	snprintf(path, sizeof(path), "/sys/class/infiniband/%s/ports/1/gids/%d", name, i);
	CHECK(access(path, F_OK), "%s", path);
}

int main(int argc, char **argv)
{
	struct ibv_device **list;
	struct ibv_context *context;
	const char *name = argv[1];
	int count;

	CHECK_EQ(argc, 2);
	list = ibv_get_device_list(&count);
	CHECK(list, "%s", strerror(errno));
	CHECK_EQ(count, 1);
	CHECK(!strcmp(ibv_get_device_name(list[0]), name), "%s", ibv_get_device_name(list[0]));
	context = ibv_open_device(list[0]);
	CHECK(context, "%s", strerror(errno));
	device(name, context);
	port(name, context);
	gids(name, context);
	ibv_close_device(context);
	ibv_free_device_list(list);
	return 0;
}
