/*
 * Programs that load the library when they run, by whatever name: they get the container's device, or none.
 *
 *   loading NAME                the first device of the library of that name is opened; `new:NAME` in a namespace of its own
 *
 * Not linked to libibverbs, as NCCL, mscclpp and others are not.
 */
#include "../check.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>

/* Enough of verbs.h, which would have the compiler ask for the library. */
struct ibv_device;
struct ibv_context;

static void *symbol(void *library, const char *name, const char *version)
{
	void *found = dlvsym(library, name, version);

	CHECK(found, "%s@%s: %s", name, version, dlerror());
	return found;
}

int main(int argc, char **argv)
{
	bool new = argc == 2 && !strncmp(argv[1], "new:", 4);
	const char *name = argc == 2 ? argv[1] + (new ? 4 : 0) : "";
	Dl_info info = {0};
	int count = -1;

	setvbuf(stdout, NULL, _IONBF, 0);
	void *library = new ? dlmopen(LM_ID_NEWLM, name, RTLD_NOW) : dlopen(name, RTLD_NOW);

	CHECK(library, "%s", dlerror());
	int (*fork_init)(void) = symbol(library, "ibv_fork_init", "IBVERBS_1.1");
	struct ibv_device **(*list)(int *) = symbol(library, "ibv_get_device_list", "IBVERBS_1.1");
	void (*free_list)(struct ibv_device **) = symbol(library, "ibv_free_device_list", "IBVERBS_1.1");
	const char *(*name_of)(struct ibv_device *) = symbol(library, "ibv_get_device_name", "IBVERBS_1.1");
	struct ibv_context *(*open_device)(struct ibv_device *) = symbol(library, "ibv_open_device", "IBVERBS_1.1");
	int (*close_device)(struct ibv_context *) = symbol(library, "ibv_close_device", "IBVERBS_1.1");

	dladdr((void *)list, &info);
	printf("%s is %s\n", name, info.dli_fname ? info.dli_fname : "unknown");
	CHECK_EQ(fork_init(), 0);
	struct ibv_device **devices = list(&count);

	/* The answer of a library that finds no driver. */
	if (!devices && errno == ENOSYS)
		count = 0;
	else
		CHECK(devices, "ibv_get_device_list: %s", strerror(errno));
	printf("%d devices\n", count);
	if (count == 0)
		return 3;
	printf("the first is %s\n", name_of(devices[0]));
	struct ibv_context *context = open_device(devices[0]);

	CHECK(context, "ibv_open_device: %s", strerror(errno));
	CHECK_EQ(close_device(context), 0);
	free_list(devices);
	dlclose(library);
	return 0;
}
