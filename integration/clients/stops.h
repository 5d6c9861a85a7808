/* Proxies that are stopped and go on. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

int64_t now_us(void);
/* The process of this variable of the environment. */
pid_t pid_of(const char *name);
/* The thread that moves a proxy's data. */
pid_t worker_of(pid_t proxy);
/* Whether a proxy's worker is stopped within so many milliseconds, by whomever. */
bool is_stopped(pid_t proxy, int ms);
/* Stops a proxy; its worker is stopped at the return. */
void stop(pid_t proxy);
void go_on(pid_t proxy);
