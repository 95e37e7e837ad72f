/* system.h -- what the machine, and the container around the process, grant. */
#pragma once
#include <stdint.h>

/* CPUs this process may use: affinity, cut by the cgroup's quota; of a Mac's the fast ones.  At least 1. */
int system_cpus(void);
/* Bytes that can still be taken; on a Mac all that it has.  INT64_MAX where nothing says. */
int64_t system_memory_free(void);
