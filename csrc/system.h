/* system.h -- what the machine, and the container around the process, grant. */
#pragma once
#include <stdint.h>

int system_cpus(
    void); /* CPUs this process may use: affinity, cut by the cgroup's quota; of a Mac's its fast ones; at least 1 */
int64_t system_memory_free(void); /* bytes that can still be taken; INT64_MAX where nothing says */
