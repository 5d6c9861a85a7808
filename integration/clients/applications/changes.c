/*
 * The program changes the mapping of memory that is registered. The region keeps its pages, as with a driver that has pinned
 * them; what the program has made of its mapping is what that is of private memory. See topic.h.
 */
#include "topic.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { LENGTH = MIB };

static struct loop loop;
/* Where the region's own pages are looked at. */
static unsigned char *seen;
static struct ibv_mr *seen_mr;

static void open_loop(void)
{
	loop = loop_open();
	seen = topic_memory(LENGTH, 0);
	seen_mr = loop_reg(&loop, seen, LENGTH);
}

/* What the device has at the region's `offset`: it need not be what the program has there. */
static void region_has(struct ibv_mr *mr, size_t offset, size_t length, int value)
{
	memset(seen, ~value, length);
	loop_write(&loop, seen_mr, seen, mr, (char *)mr->addr + offset, length);
	topic_all(seen, length, value, "the region");
}

/* The device writes `value` to the region. */
static void write_region(struct ibv_mr *mr, size_t offset, size_t length, int value)
{
	memset(seen, value, length);
	loop_write(&loop, mr, (char *)mr->addr + offset, seen_mr, seen, length);
}

/* The memory is registered anew and must be of use. */
static void useful_again(unsigned char *at, size_t length)
{
	struct ibv_mr *mr = loop_reg(&loop, at, length);

	memset(at, 0x31, length);
	region_has(mr, 0, length, 0x31);
	write_region(mr, 0, length, 0x32);
	topic_all(at, length, 0x32, "written by the device");
	loop_dereg(mr);
	topic_all(at, length, 0x32, "deregistered");
}

static void dontneed_registered(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK_EQ(madvise(at, LENGTH, MADV_DONTNEED), 0);
	topic_all(at, LENGTH, 0, "after MADV_DONTNEED");
	region_has(mr, 0, LENGTH, 7);
	memset(at, 9, LENGTH);
	loop_dereg(mr);
	topic_all(at, LENGTH, 9, "deregistered");
	useful_again(at, LENGTH);
}

static void dontneed_deregistered(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);

	loop_dereg(loop_reg(&loop, at, LENGTH));
	CHECK_EQ(madvise(at, LENGTH, MADV_DONTNEED), 0);
	topic_all(at, LENGTH, 0, "after MADV_DONTNEED");
	useful_again(at, LENGTH);
}

/* As programs do that are linked to their C library or allocator statically, and Go. */
static void dontneed_deregistered_by_the_system_call(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);

	loop_dereg(loop_reg(&loop, at, LENGTH));
	CHECK_EQ(syscall(SYS_madvise, at, LENGTH, MADV_DONTNEED), 0);
	topic_all(at, LENGTH, 0, "after MADV_DONTNEED");
	useful_again(at, LENGTH);
}

/* Every second page of it, and a page more on each side. */
static void dontneed_in_parts(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH + 2 * PAGE, 7);
	struct ibv_mr *mr = loop_reg(&loop, at + PAGE, LENGTH);

	CHECK_EQ(madvise(at, 2 * PAGE, MADV_DONTNEED), 0);
	topic_all(at, 2 * PAGE, 0, "the first two pages");
	for (size_t offset = 3 * PAGE; offset < LENGTH; offset += 2 * PAGE)
		CHECK_EQ(madvise(at + offset, PAGE, MADV_DONTNEED), 0);
	for (size_t offset = 2 * PAGE; offset < LENGTH; offset += PAGE)
		topic_all(at + offset, PAGE, offset / PAGE % 2 ? 0 : 7, "a page");
	region_has(mr, 0, LENGTH, 7);
	loop_dereg(mr);
	for (size_t offset = 2 * PAGE; offset < LENGTH; offset += PAGE)
		topic_all(at + offset, PAGE, offset / PAGE % 2 ? 0 : 7, "a page, deregistered");
	useful_again(at, LENGTH);
}

static void free_advice(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK_EQ(madvise(at, LENGTH, MADV_FREE), 0);
	for (size_t i = 0; i < LENGTH; i++)
		CHECK(at[i] == 0 || at[i] == 7, "byte %zu is %#x", i, at[i]);
	memset(at, 9, LENGTH);
	topic_all(at, LENGTH, 9, "written");
	loop_dereg(mr);
	topic_all(at, LENGTH, 9, "deregistered");
	useful_again(at, LENGTH);
}

/* Private memory has no file that could be punched. */
static void remove_advice(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK(madvise(at, LENGTH, MADV_REMOVE) == -1 && errno == EINVAL, "%s", strerror(errno));
	topic_all(at, LENGTH, 7, "after MADV_REMOVE");
	loop_dereg(mr);
	topic_all(at, LENGTH, 7, "deregistered");
}

/* A buffer of malloc's grows by mremap, or is copied where it is several mappings: the program notices neither. */
static void realloc_grows(void)
{
	enum { LARGER = 4 * LENGTH };

	open_loop();
	unsigned char *at = malloc(LENGTH);

	memset(at, 7, LENGTH);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	at = realloc(at, LARGER);
	CHECK(at, "%s", strerror(errno));
	topic_all(at, LENGTH, 7, "after realloc");
	memset(at, 9, LARGER);
	topic_all(at, LARGER, 9, "written");
	loop_dereg(mr);
	topic_all(at, LARGER, 9, "deregistered");
	useful_again(at, LENGTH);
	mr = loop_reg(&loop, at, LARGER);
	loop_dereg(mr);
	at = realloc(at, LENGTH);
	useful_again(at, LENGTH);
	free(at);
}

static void moved_by_mremap(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);
	unsigned char *target = topic_memory(LENGTH, 0);

	CHECK(mremap(at, LENGTH, LENGTH, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target, "%s", strerror(errno));
	topic_all(target, LENGTH, 7, "moved");
	write_region(mr, 0, LENGTH, 8);
	topic_all(target, LENGTH, 8, "written by the device at its new place");
	loop_dereg(mr);
	topic_all(target, LENGTH, 8, "deregistered");
	pid_t child = fork();

	if (!child) {
		memset(target, 1, LENGTH);
		_exit(0);
	}
	topic_ended_well(child, "a child");
	topic_all(target, LENGTH, 8, "after a child has written to its own");
	useful_again(target, LENGTH);
}

static void unmapped_in_part(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK_EQ(munmap(at + LENGTH / 4, LENGTH / 2), 0);
	region_has(mr, 0, LENGTH, 7);
	topic_all(at, LENGTH / 4, 7, "what is left");
	loop_dereg(mr);
	topic_all(at, LENGTH / 4, 7, "what is left, deregistered");
	topic_all(at + 3 * LENGTH / 4, LENGTH / 4, 7, "what is left, deregistered");
	/* Nothing has come back where nothing is. */
	unsigned char resident[LENGTH / 2 / PAGE];

	CHECK(mincore(at + LENGTH / 4, LENGTH / 2, resident) == -1 && errno == ENOMEM, "there is something");
	useful_again(at, LENGTH / 4);
}

static void mapped_over(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK(mmap(at, LENGTH / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at, "%s",
	      strerror(errno));
	topic_all(at, LENGTH / 2, 0, "mapped over");
	memset(at, 9, LENGTH / 2);
	region_has(mr, 0, LENGTH, 7);
	loop_dereg(mr);
	topic_all(at, LENGTH / 2, 9, "mapped over, deregistered");
	topic_all(at + LENGTH / 2, LENGTH / 2, 7, "the other half, deregistered");
	useful_again(at, LENGTH);
}

static void protected_in_part(void)
{
	open_loop();
	unsigned char *at = topic_memory(LENGTH, 7);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK_EQ(mprotect(at + LENGTH / 4, LENGTH / 4, PROT_READ), 0);
	/* The rights that the region was registered with are what counts. */
	write_region(mr, 0, LENGTH, 8);
	topic_all(at, LENGTH, 8, "written by the device");
	loop_dereg(mr);
	topic_all(at, LENGTH, 8, "deregistered");
	pid_t child = fork();

	if (!child) {
		at[LENGTH / 4] = 1;
		_exit(0);
	}
	int status;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV, "read-only memory was written: status %#x", status);
	CHECK_EQ(mprotect(at + LENGTH / 4, LENGTH / 4, PROT_READ | PROT_WRITE), 0);
	useful_again(at, LENGTH);
}

/* The heap shrinks under a region and grows again: what comes is zero. */
static void heap_shrinks(void)
{
	open_loop();
	unsigned char *at = (unsigned char *)(((uintptr_t)sbrk(0) + PAGE - 1) & -(uintptr_t)PAGE);

	CHECK_EQ(brk(at + LENGTH), 0);
	memset(at, 7, LENGTH);
	struct ibv_mr *mr = loop_reg(&loop, at, LENGTH);

	CHECK_EQ(brk(at + LENGTH / 2), 0);
	CHECK_EQ(brk(at + LENGTH), 0);
	topic_all(at, LENGTH / 2, 7, "below");
	topic_all(at + LENGTH / 2, LENGTH / 2, 0, "above");
	memset(at + LENGTH / 2, 9, LENGTH / 2);
	region_has(mr, 0, LENGTH, 7);
	loop_dereg(mr);
	topic_all(at, LENGTH / 2, 7, "below, deregistered");
	topic_all(at + LENGTH / 2, LENGTH / 2, 9, "above, deregistered");
	useful_again(at, LENGTH);
}

int main(int argc, char **argv)
{
	static const struct topic_case cases[] = {
		{"dontneed_registered", dontneed_registered},
		{"dontneed_deregistered", dontneed_deregistered},
		{"dontneed_deregistered_by_the_system_call", dontneed_deregistered_by_the_system_call},
		{"dontneed_in_parts", dontneed_in_parts},
		{"free_advice", free_advice},
		{"remove_advice", remove_advice},
		{"realloc_grows", realloc_grows},
		{"moved_by_mremap", moved_by_mremap},
		{"unmapped_in_part", unmapped_in_part},
		{"mapped_over", mapped_over},
		{"protected_in_part", protected_in_part},
		{"heap_shrinks", heap_shrinks},
		{NULL, NULL},
	};

	return topic_main(cases, argc, argv);
}
