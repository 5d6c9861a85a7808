/* The same for i386, without that architecture's headers and start files: built with -m32 -nostdlib. */
extern int puts(const char *text);
extern void exit(int status) __attribute__((noreturn));

void _start(void);
void _start(void)
{
	puts("hello");
	exit(0);
}
