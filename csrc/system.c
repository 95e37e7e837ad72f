/* system.c -- CPUs and memory as the process may really use them: a container on a large machine has far less. */
#define _GNU_SOURCE
#include "system.h"
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__linux__)

/* Call use(folder, data) for the cgroup of this process and each of its parents, as far as they can be seen. */
static void each_cgroup(const char *controller, void (*use)(const char *folder, void *data), void *data) {
    char line[4096], folder[4400];
    FILE *f = fopen("/proc/self/cgroup", "r");
    if (!f) return;
    while (fgets(line, sizeof line, f)) { /* "0::/path" (version 2) or "4:cpu,cpuacct:/path" (version 1) */
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':'), *path = names ? strchr(names + 1, ':') : NULL;
        if (!path) continue;
        *path++ = 0;
        int v2 = names[1] == 0;
        if (!v2 && !strstr(names + 1, controller)) continue;
        for (;;) {
            snprintf(folder, sizeof folder, "/sys/fs/cgroup%s%s%s", v2 ? "" : "/", v2 ? "" : controller, path);
            use(folder, data);
            char *slash = strrchr(path, '/');
            if (!slash || !path[1]) break;
            slash[slash == path] = 0; /* cut the last name, but keep the root's slash */
        }
    }
    fclose(f);
}

/* The numbers at the head of a file: how many were read, at most 2.  "max" reads as none. */
static int read_numbers(const char *folder, const char *name, long long *a, long long *b) {
    char path[4600];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    if (!f) return 0;
    int n = fscanf(f, "%lld %lld", a, b);
    fclose(f);
    return n < 0 ? 0 : n;
}

static void cut_cpus(const char *folder, void *data) {
    long long quota, period, none;
    int ok = read_numbers(folder, "cpu.max", &quota, &period) == 2;
    if (!ok)
        ok = read_numbers(folder, "cpu.cfs_quota_us", &quota, &none) &&
             read_numbers(folder, "cpu.cfs_period_us", &period, &none);
    if (!ok || quota <= 0 || period <= 0) return;
    long long cpus = (quota + period - 1) / period;
    if (cpus < *(int *)data) *(int *)data = (int)cpus;
}

int system_cpus(void) {
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) ? (int)sysconf(_SC_NPROCESSORS_ONLN) : CPU_COUNT(&set);
    each_cgroup("cpu", cut_cpus, &n);
    return n < 1 ? 1 : n;
}

static void cut_memory(const char *folder, void *data) {
    long long limit, used, none;
    int ok = read_numbers(folder, "memory.max", &limit, &none) && read_numbers(folder, "memory.current", &used, &none);
    if (!ok)
        ok = read_numbers(folder, "memory.limit_in_bytes", &limit, &none) &&
             read_numbers(folder, "memory.usage_in_bytes", &used, &none);
    if (ok && limit - used < *(int64_t *)data) *(int64_t *)data = limit > used ? limit - used : 0;
}

int64_t system_memory_free(void) {
    int64_t n = INT64_MAX;
    char line[256];
    long long kb;
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lld kB", &kb) == 1) n = kb * 1024;
    if (f) fclose(f);
    each_cgroup("memory", cut_memory, &n);
    return n;
}

#else

static int cpus_online(void) {
    long n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : (int)n;
}

#if defined(__APPLE__)

/* 0: macOS has no such number here. */
static int64_t number_of(const char *name) {
    int64_t n = 0; /* some are 4 bytes long */
    size_t size = sizeof n;
    return sysctlbyname(name, &n, &size, NULL, 0) ? 0 : n;
}

/* The fast ones, where there are two kinds: a product waits for its slowest part. */
int system_cpus(void) {
    int64_t fast = number_of("hw.perflevel0.logicalcpu");
    return fast > 0 ? (int)fast : cpus_online();
}

int64_t system_memory_free(void) {
    int64_t all = number_of("hw.memsize");
    return all > 0 ? all : INT64_MAX;
}

#else

int system_cpus(void) { return cpus_online(); }
int64_t system_memory_free(void) { return INT64_MAX; }

#endif

#endif
