/* A program without any verbs. It checks nothing but that it runs; who runs it looks at all that it says. */
#include <stdio.h>

int main(void)
{
	puts("hello");
	return 0;
}
