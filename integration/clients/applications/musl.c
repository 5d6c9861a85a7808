/*
 * A program of musl's, whose dynamic linker knows neither /etc/ld.so.preload nor versions of symbols: it opens the first
 * device and registers memory. With LINKED defined it is linked to libibverbs.so.1, else it loads it.
 *
 * The declarations are verbs.h's, which musl's compiler does not find.
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct ibv_device;
struct ibv_context;
struct ibv_pd;
struct ibv_mr;

#ifdef LINKED
extern struct ibv_device **ibv_get_device_list(int *count);
extern struct ibv_context *ibv_open_device(struct ibv_device *device);
extern struct ibv_pd *ibv_alloc_pd(struct ibv_context *context);
extern struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *at, size_t length, int access);
extern int ibv_dereg_mr(struct ibv_mr *mr);
#define LIBRARY_SYMBOL(name) name
#else
#define LIBRARY_SYMBOL(name) dlsym(library, #name)
#endif

static unsigned char memory[65536];

int main(void)
{
	int count = -1;
#ifndef LINKED
	void *library = dlopen("libibverbs.so.1", RTLD_NOW);

	if (!library) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
#endif
	struct ibv_device **(*list)(int *) = LIBRARY_SYMBOL(ibv_get_device_list);
	struct ibv_context *(*open_device)(struct ibv_device *) = LIBRARY_SYMBOL(ibv_open_device);
	struct ibv_pd *(*alloc_pd)(struct ibv_context *) = LIBRARY_SYMBOL(ibv_alloc_pd);
	struct ibv_mr *(*reg_mr)(struct ibv_pd *, void *, size_t, int) = LIBRARY_SYMBOL(ibv_reg_mr);
	int (*dereg_mr)(struct ibv_mr *) = LIBRARY_SYMBOL(ibv_dereg_mr);
	struct ibv_device **devices = list(&count);
	struct ibv_context *context = devices && count > 0 ? open_device(devices[0]) : NULL;
	struct ibv_pd *pd = context ? alloc_pd(context) : NULL;

	printf("%d devices\n", count);
	memset(memory, 7, sizeof(memory));
	struct ibv_mr *mr = pd ? reg_mr(pd, memory, sizeof(memory), 1) : NULL;

	if (!mr || dereg_mr(mr)) {
		fprintf(stderr, "%s\n", strerror(errno));
		return 1;
	}
	for (size_t i = 0; i < sizeof(memory); i++)
		if (memory[i] != 7) {
			fprintf(stderr, "byte %zu is %d\n", i, memory[i]);
			return 1;
		}
	puts("registered and deregistered");
	return 0;
}
