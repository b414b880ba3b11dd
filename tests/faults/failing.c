/* Makes system calls on the files of a database fail; loaded with LD_PRELOAD, see `failing_disk`.

   A write that fails has written half of what it was to write; a sync that fails may have synced or not. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static char files[4096];
static long calls, at;
static long how_many;

/* From now on count the calls on files whose path contains `part`, and let the one with this number fail, counted from 1, and those
   after it, so many in all. 0: none. */
void failing_arm(const char *part, long number, long count) {
    strncpy(files, part, sizeof files - 1);
    calls = 0;
    at = number;
    how_many = count;
}

/* The number of calls since then. */
long failing_calls(void) { return __atomic_load_n(&calls, __ATOMIC_SEQ_CST); }

static int fails(int fd) {
    char link[64], path[4096];
    ssize_t length;
    long call;
    if (!*files)
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    if (!strstr(path, files))
        return 0;
    call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    return at && call >= at && call - at < how_many;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL (errno = EIO, -1)

int fsync(int fd) { return fails(fd) ? FAIL : REAL(fsync)(fd); }
int fdatasync(int fd) { return fails(fd) ? FAIL : REAL(fdatasync)(fd); }
int ftruncate(int fd, off_t length) { return fails(fd) ? FAIL : REAL(ftruncate)(fd, length); }
int ftruncate64(int fd, off64_t length) { return fails(fd) ? FAIL : REAL(ftruncate64)(fd, length); }

ssize_t pread(int fd, void *into, size_t size, off_t offset) { return fails(fd) ? FAIL : REAL(pread)(fd, into, size, offset); }
ssize_t pread64(int fd, void *into, size_t size, off64_t offset) {
    return fails(fd) ? FAIL : REAL(pread64)(fd, into, size, offset);
}

ssize_t pwrite(int fd, const void *from, size_t size, off_t offset) {
    if (!fails(fd))
        return REAL(pwrite)(fd, from, size, offset);
    return REAL(pwrite)(fd, from, size / 2, offset) < 0 ? -1 : FAIL;
}
ssize_t pwrite64(int fd, const void *from, size_t size, off64_t offset) {
    if (!fails(fd))
        return REAL(pwrite64)(fd, from, size, offset);
    return REAL(pwrite64)(fd, from, size / 2, offset) < 0 ? -1 : FAIL;
}
