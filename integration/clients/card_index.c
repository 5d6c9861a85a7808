/*
 * What librdmacm has libibverbs copy: says under which number the device is known to the kernel, and which index of the container's the
 * indices 0 to 5 of the card's GID table become.
 */
#include <infiniband/verbs.h>
#include <rdma/ib_user_verbs.h>
#include <stdio.h>
#include <string.h>

/* Of <infiniband/marshall.h>, which not every package of headers has. */
void ibv_copy_ah_attr_from_kern(struct ibv_ah_attr *to, struct ib_uverbs_ah_attr *from);
void ibv_copy_qp_attr_from_kern(struct ibv_qp_attr *to, struct ib_uverbs_qp_attr *from);

int main(void)
{
	int count;
	struct ibv_device **list = ibv_get_device_list(&count);
	struct ib_uverbs_qp_attr theirs = {.ah_attr = {.is_global = 1, .port_num = 1}};
	struct ibv_qp_attr ours;

	if (!list || count != 1) {
		perror("card_index: devices");
		return 1;
	}
	printf("%d:", ibv_get_device_index(list[0]));
	for (int index = 0; index < 6; index++) {
		theirs.ah_attr.grh.sgid_index = index;
		ibv_copy_qp_attr_from_kern(&ours, &theirs);
		printf(" %d", ours.ah_attr.grh.sgid_index);
	}
	/* An address without a GID, and one of a port that there is not. */
	theirs.ah_attr = (struct ib_uverbs_ah_attr){.grh = {.sgid_index = 7}, .port_num = 1};
	ibv_copy_ah_attr_from_kern(&ours.ah_attr, &theirs.ah_attr);
	printf(" %d", ours.ah_attr.grh.sgid_index);
	theirs.ah_attr = (struct ib_uverbs_ah_attr){.grh = {.sgid_index = 3}, .is_global = 1, .port_num = 2};
	ibv_copy_ah_attr_from_kern(&ours.ah_attr, &theirs.ah_attr);
	printf(" %d\n", ours.ah_attr.grh.sgid_index);
	ibv_free_device_list(list);
	return 0;
}
