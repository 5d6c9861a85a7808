/*
 * Registers a descriptor of memory that no process reaches by an address: dmabuf, or "dmabuf refused" where the device cannot.
 *
 * A memory file stands for a dma-buf, as it does for the card that is not there. To kernels it is none, and they say so.
 */
#include "loop.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, LENGTH = 8 * PAGE, OFFSET = PAGE + 24, ALL = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE };

static struct loop loop;

static void refused(int fd)
{
	CHECK(!ibv_reg_dmabuf_mr(loop.pd, 0, PAGE, 0, fd, ALL), "descriptor %d is registered", fd);
	CHECK(errno == EOPNOTSUPP || errno == EINVAL || errno == EBADF, "errno %d", errno);
}

int main(int argc, char **argv)
{
	int fd = memfd_create("dmabuf", MFD_CLOEXEC), ends[2];
	uint64_t iova = 0x7000000000 + OFFSET % PAGE;

	CHECK_EQ(ftruncate(fd, 4 * LENGTH), 0);
	CHECK_EQ(pipe(ends), 0);
	loop = loop_open();
	refused(-1);
	refused(ends[0]);
	if (argc > 1 && !strcmp(argv[1], "refused")) {
		refused(fd);
		return 0;
	}
	CHECK(!ibv_reg_dmabuf_mr(loop.pd, OFFSET, 4 * LENGTH, iova, fd, ALL) && errno == EINVAL, "errno %d", errno);
	struct ibv_mr *mr = ibv_reg_dmabuf_mr(loop.pd, OFFSET, LENGTH, iova, fd, ALL);

	CHECK(mr, "errno %d", errno);
	CHECK_EQ(mr->length, LENGTH);
	unsigned char *behind = mmap(NULL, 4 * LENGTH, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	unsigned char *own = mmap(NULL, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *own_mr = loop_reg(&loop, own, LENGTH);

	CHECK(behind != MAP_FAILED && own != MAP_FAILED, "errno %d", errno);
	/* As the target, and as the source. */
	loop_fill(own, LENGTH, 1);
	loop_write(&loop, mr, (void *)(uintptr_t)iova, own_mr, own, LENGTH);
	loop_check_filled(behind + OFFSET, LENGTH, 1);
	loop_fill(behind + OFFSET, LENGTH, 2);
	loop_write(&loop, own_mr, own, mr, (void *)(uintptr_t)iova, LENGTH);
	loop_check_filled(own, LENGTH, 2);
	for (int i = 0; i < 2000; i++) {
		struct ibv_mr *again = ibv_reg_dmabuf_mr(loop.pd, 0, LENGTH, 0, fd, ALL);

		CHECK(again, "round %d: errno %d", i, errno);
		loop_dereg(again);
	}
	loop_dereg(mr);
	/* The descriptor is the program's, and what is behind it as well. */
	CHECK_EQ(fcntl(fd, F_GETFD), FD_CLOEXEC);
	loop_check_filled(behind + OFFSET, LENGTH, 2);
	loop_dereg(own_mr);
	loop_close(&loop);
	return 0;
}
