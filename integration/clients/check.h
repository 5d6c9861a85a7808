/* What a test program expects, and how it ends when that does not hold. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Says what did not hold, with a message in the manner of printf, and ends the program. */
__attribute__((noreturn, format(printf, 4, 5))) void check_failed(const char *file, int line, const char *condition,
								   const char *format, ...);

/* Of this process. */
int open_descriptors(void);

#define CHECK(condition, ...)                                                                                          \
	do {                                                                                                           \
		if (!(condition))                                                                                      \
			check_failed(__FILE__, __LINE__, #condition, " " __VA_ARGS__);                                 \
	} while (0)

#define CHECK_EQ(left, right)                                                                                          \
	do {                                                                                                           \
		long long left_ = (long long)(left), right_ = (long long)(right);                                      \
		if (left_ != right_)                                                                                   \
			check_failed(__FILE__, __LINE__, #left, " %lld (%#llx), expected %lld (%#llx)", left_, left_,  \
				     right_, right_);                                                                  \
	} while (0)
