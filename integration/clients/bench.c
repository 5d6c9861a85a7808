/*
 * Measures one thing of one process, beside its floor where it has one, and prints lines "name value". What goes from one
 * process to another is in bench_pair.c.
 *
 *   bench register BYTES        ibv_reg_mr of fresh memory beside pwrite into a new memory file, ns
 *   bench again BYTES BUFFERS   register, WRITE from, deregister these buffers in turn, beside pwrite into a memory file, ns
 *   bench rounds COUNT          mappings, and KiB of memory, after so many more of such rounds of 4 KiB
 */
#include "bench_time.h"
#include "loop.h"

#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ROUNDS = 5 };

static void reg(size_t bytes)
{
	enum { MANY = 2001, SOME = 101 };
	struct loop loop = loop_open();
	double regs[MANY], pwrites[MANY];
	/* What takes microseconds must be warm to say anything. */
	int rounds = bytes <= 1 << 16 ? MANY : bytes <= 1 << 20 ? SOME : (int)amount(ROUNDS);

	for (int round = 0; round < rounds; round++) {
		char *at = memory(bytes);
		uint64_t start = now_ns();
		int fd = (int)syscall(SYS_memfd_create, "floor", 0);
		CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0, "memfd");
		for (size_t done = 0; done < bytes;) {
			ssize_t step = pwrite(fd, at + done, bytes - done, (off_t)done);
			CHECK(step > 0, "pwrite");
			done += (size_t)step;
		}
		uint64_t middle = now_ns();
		close(fd);
		uint64_t again = now_ns();
		struct ibv_mr *mr = loop_reg(&loop, at, bytes);
		uint64_t end = now_ns();
		pwrites[round] = (double)(middle - start);
		regs[round] = (double)(end - again);
		loop_dereg(mr);
		munmap(at, bytes);
	}
	printf("pwrite %.0f\nregister %.0f\n", median(pwrites, (size_t)rounds), median(regs, (size_t)rounds));
}

static void use_once(struct loop *loop, struct ibv_mr *to, void *at, uint32_t bytes)
{
	struct ibv_mr *from = loop_reg(loop, at, bytes);

	loop_write(loop, to, to->addr, from, at, bytes);
	loop_dereg(from);
}

static void again(size_t bytes, int buffers)
{
	enum { SLICES = 41 };
	struct loop loop = loop_open();
	struct ibv_mr *to = loop_reg(&loop, memory(bytes), bytes);
	char *at[64];
	double rounds[SLICES], pwrites[SLICES];
	int fd = (int)syscall(SYS_memfd_create, "floor", 0), slice_rounds = (int)amount(bytes > 262144 ? 32 : 320);

	CHECK(fd >= 0 && buffers >= 1 && buffers <= 64, "memfd, or buffers");
	for (int i = 0; i < buffers; i++)
		at[i] = memory(bytes);
	pin(0);
	/* Floor and figure take turns, so that a change of the machine's mood meets both; the first slices warm up. */
	for (int slice = -4; slice < SLICES; slice++) {
		uint64_t start = now_ns();
		for (int i = 0; i < slice_rounds; i++)
			CHECK(pwrite(fd, at[i % buffers], bytes, 0) == (ssize_t)bytes, "pwrite");
		uint64_t middle = now_ns();
		for (int i = 0; i < slice_rounds; i++)
			use_once(&loop, to, at[i % buffers], (uint32_t)bytes);
		uint64_t end = now_ns();
		if (slice >= 0) {
			pwrites[slice] = (double)(middle - start) / slice_rounds;
			rounds[slice] = (double)(end - middle) / slice_rounds;
		}
	}
	printf("pwrite %.0f\nagain %.0f\n", median(pwrites, SLICES), median(rounds, SLICES));
}

static long lines_of(const char *path)
{
	FILE *file = fopen(path, "r");
	long lines = 0;
	int c;

	CHECK(file, "%s", path);
	while ((c = getc(file)) != EOF)
		lines += c == '\n';
	fclose(file);
	return lines;
}

static long resident_kib(void)
{
	FILE *file = fopen("/proc/self/statm", "r");
	long pages;

	CHECK(file && fscanf(file, "%*d %ld", &pages) == 1, "statm");
	fclose(file);
	return pages * 4;
}

static void rounds(int count)
{
	struct loop loop = loop_open();
	struct ibv_mr *to = loop_reg(&loop, memory(4096), 4096);
	char *at[16];

	for (int i = 0; i < 16; i++)
		at[i] = memory(4096);
	for (int i = 0; i < 100; i++)
		use_once(&loop, to, at[i % 16], 4096);
	long mappings = lines_of("/proc/self/maps"), kib = resident_kib();
	for (int i = 0; i < count; i++)
		use_once(&loop, to, at[i % 16], 4096);
	printf("mappings %ld\nkib %ld\n", lines_of("/proc/self/maps") - mappings, resident_kib() - kib);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	uint64_t bytes = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;

	if (!strcmp(what, "register") && bytes)
		reg(bytes);
	else if (!strcmp(what, "again") && bytes && argc > 3)
		again(bytes, atoi(argv[3]));
	else if (!strcmp(what, "rounds") && bytes)
		rounds((int)amount(bytes));
	else
		return fprintf(stderr, "usage: see the head of bench.c\n"), 2;
	return 0;
}
