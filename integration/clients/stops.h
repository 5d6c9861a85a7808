/* Proxies that are stopped and go on. */
#pragma once

#include <stdint.h>
#include <sys/types.h>

int64_t now_us(void);
/* The process of this variable of the environment. */
pid_t pid_of(const char *name);
/* The thread that moves a proxy's data. */
pid_t worker_of(pid_t proxy);
/* Stops a proxy; its worker is stopped at the return. */
void stop(pid_t proxy);
void go_on(pid_t proxy);
