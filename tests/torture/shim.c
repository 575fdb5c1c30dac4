/* Counts the calls of a process that change files below given folders, and fails one of them.

   Loaded with LD_PRELOAD. It stays idle until `torture_arm(path)` or the variable TORTURE_CONTROL
   names a control file (see `struct control`; shim.py writes it). The file is mapped shared, so that
   children count on, and so that the count outlives a process that is killed.

   Calls are made through syscall(2), so that nothing here depends on the C library's own symbols. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = -1, TORN = -2 };

struct control {
    long calls;   /* calls so far */
    long at;      /* number of the call that fails, from 1; 0: none */
    long action;  /* an errno, KILL (before the call) or TORN (half of a write, else after it) */
    long onwards; /* 1: later calls fail too; 2: of these only the ones that need space */
    long fired;   /* number of the call that failed first */
    long logged;  /* whether calls are written to `log` */
    char folder[1024]; /* ends with a slash: only paths below it count */
    char log[1024];
};

static struct control *control;

static void map_control(const char *path) {
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return;
    void *at = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (at != MAP_FAILED) control = at;
}

void torture_arm(const char *path) { map_control(path); }

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("TORTURE_CONTROL");
    if (path && *path) map_control(path);
}

/* -- which file */

static int of_descriptor(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
    return n > 0;
}

static void absolute(int folder, const char *path, char *out) {
    size_t used = 0;
    out[0] = 0;
    if (!path) return;
    if (path[0] != '/') {
        if (folder == AT_FDCWD) {
            if (syscall(SYS_getcwd, out, PATH_MAX) < 0) out[0] = 0;
        } else {
            of_descriptor(folder, out);
        }
        used = strlen(out);
        if (used + 1 < PATH_MAX) out[used++] = '/';
    }
    snprintf(out + used, PATH_MAX - used, "%s", path);
}

/* The folder itself counts too: syncing it makes the names in it last. */
static int watched(const char *path) {
    size_t length = strlen(control->folder);
    return !strncmp(path, control->folder, length) ||
           (strlen(path) == length - 1 && !strncmp(path, control->folder, length - 1));
}

/* -- what happens to a call: 0 it goes through, 1 it fails with errno, 2 half and die, 3 die after */

static void note(long n, const char *call, const char *path, const char *more) {
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", n, call, path, more ? more : "");
    int fd = syscall(SYS_openat, AT_FDCWD, control->log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC,
                     0600);
    if (fd < 0) return;
    if (length > 0) (void)!syscall(SYS_write, fd, line, (size_t)length);
    syscall(SYS_close, fd);
}

static void die(void) {
    syscall(SYS_kill, 0, SIGKILL); /* the whole group: the worker processes of a run too */
    for (;;) pause();
}

static int fate(const char *call, const char *path, const char *more, int grows) {
    if (!control || !watched(path)) return 0;
    int before = errno;
    long n = __atomic_add_fetch(&control->calls, 1, __ATOMIC_SEQ_CST);
    if (control->logged) note(n, call, path, more);
    errno = before;
    long at = control->at;
    if (!at || n < at) return 0;
    if (n > at && !(control->onwards == 1 || (control->onwards == 2 && grows))) return 0;
    if (n == at && control->onwards == 2 && !grows) {
        control->fired = n;
        return 0; /* the disk is full from here on; this call needs no space */
    }
    if (n == at) control->fired = n;
    if (control->action == KILL) die();
    if (control->action == TORN) return strstr(call, "write") ? 2 : 3;
    errno = (int)control->action;
    return 1;
}

/* At a call without a torn form. */
#define CALL(grows, name, path, more, number, ...)                    \
    do {                                                              \
        int f = fate(name, path, more, grows);                        \
        if (f == 1) return -1;                                        \
        long r = syscall(number, __VA_ARGS__);                        \
        if (f) die();                                                 \
        return r;                                                     \
    } while (0)

/* -- calls by path */

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char full[PATH_MAX];
    if (!control || !(flags & (O_CREAT | O_TRUNC)))
        return syscall(SYS_openat, folder, path, flags, mode);
    absolute(folder, path, full);
    CALL(1, "open", full, NULL, SYS_openat, folder, path, flags, mode);
}

#define OPEN_MODE                                     \
    mode_t mode = 0;                                  \
    if (flags & (O_CREAT | __O_TMPFILE)) {            \
        va_list rest;                                 \
        va_start(rest, flags);                        \
        mode = va_arg(rest, mode_t);                  \
        va_end(rest);                                 \
    }

int open(const char *path, int flags, ...) { OPEN_MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) {
    OPEN_MODE return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode);
}
int openat(int at, const char *path, int flags, ...) {
    OPEN_MODE return opened(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    OPEN_MODE return opened(at, path, flags | O_LARGEFILE, mode);
}
int creat(const char *path, mode_t mode) {
    return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

static int renamed(int a, const char *from, int b, const char *to, unsigned flags) {
    char one[PATH_MAX], two[PATH_MAX];
    if (!control) return syscall(SYS_renameat2, a, from, b, to, flags);
    absolute(a, from, one);
    absolute(b, to, two);
    CALL(0, "rename", one, two, SYS_renameat2, a, from, b, to, flags);
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return renamed(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return renamed(a, from, b, to, flags);
}

static int removed(int at, const char *path, int flags) {
    char full[PATH_MAX];
    if (!control) return syscall(SYS_unlinkat, at, path, flags);
    absolute(at, path, full);
    CALL(0, flags & AT_REMOVEDIR ? "rmdir" : "unlink", full, NULL, SYS_unlinkat, at, path, flags);
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int at, const char *path, int flags) { return removed(at, path, flags); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int at, const char *path, mode_t mode) {
    char full[PATH_MAX];
    if (!control) return syscall(SYS_mkdirat, at, path, mode);
    absolute(at, path, full);
    CALL(1, "mkdir", full, NULL, SYS_mkdirat, at, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int linkat(int a, const char *from, int b, const char *to, int flags) {
    char full[PATH_MAX];
    if (!control) return syscall(SYS_linkat, a, from, b, to, flags);
    absolute(b, to, full);
    CALL(1, "link", full, from, SYS_linkat, a, from, b, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int symlinkat(const char *from, int at, const char *to) {
    char full[PATH_MAX];
    if (!control) return syscall(SYS_symlinkat, from, at, to);
    absolute(at, to, full);
    CALL(1, "symlink", full, from, SYS_symlinkat, from, at, to);
}
int symlink(const char *from, const char *to) { return symlinkat(from, AT_FDCWD, to); }

int truncate(const char *path, off_t size) {
    char full[PATH_MAX];
    if (!control) return syscall(SYS_truncate, path, size);
    absolute(AT_FDCWD, path, full);
    CALL(1, "truncate", full, NULL, SYS_truncate, path, size);
}

/* -- calls by descriptor */

#define WITH_PATH(fd, otherwise)                       \
    char full[PATH_MAX];                               \
    if (!control || !of_descriptor(fd, full)) return otherwise;

int fsync(int fd) {
    WITH_PATH(fd, syscall(SYS_fsync, fd))
    CALL(0, "fsync", full, NULL, SYS_fsync, fd);
}
int fdatasync(int fd) {
    WITH_PATH(fd, syscall(SYS_fdatasync, fd))
    CALL(0, "fdatasync", full, NULL, SYS_fdatasync, fd);
}
int ftruncate(int fd, off_t size) {
    WITH_PATH(fd, syscall(SYS_ftruncate, fd, size))
    CALL(1, "ftruncate", full, NULL, SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
int fallocate(int fd, int mode, off_t start, off_t size) {
    WITH_PATH(fd, syscall(SYS_fallocate, fd, mode, start, size))
    CALL(1, "fallocate", full, NULL, SYS_fallocate, fd, mode, start, size);
}
int fallocate64(int fd, int mode, off_t start, off_t size) {
    return fallocate(fd, mode, start, size);
}
int posix_fallocate(int fd, off_t start, off_t size) {
    return fallocate(fd, 0, start, size) < 0 ? errno : 0;
}
int posix_fallocate64(int fd, off_t start, off_t size) { return posix_fallocate(fd, start, size); }

/* A mapping may be written back to a file that no descriptor names: any msync counts. */
int msync(void *at, size_t size, int flags) {
    if (!control) return syscall(SYS_msync, at, size, flags);
    CALL(0, "msync", control->folder, NULL, SYS_msync, at, size, flags);
}

ssize_t write(int fd, const void *data, size_t size) {
    WITH_PATH(fd, syscall(SYS_write, fd, data, size))
    int f = fate("write", full, NULL, 1);
    if (f == 1) return -1;
    long r = syscall(SYS_write, fd, data, f == 2 ? size / 2 : size);
    if (f) die();
    return r;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    WITH_PATH(fd, syscall(SYS_pwrite64, fd, data, size, at))
    int f = fate("pwrite", full, NULL, 1);
    if (f == 1) return -1;
    long r = syscall(SYS_pwrite64, fd, data, f == 2 ? size / 2 : size, at);
    if (f) die();
    return r;
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return pwrite(fd, data, size, at);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    WITH_PATH(fd, syscall(SYS_writev, fd, parts, count))
    int f = fate("writev", full, NULL, 1);
    if (f == 1) return -1;
    long r = syscall(SYS_writev, fd, parts, f == 2 ? (count + 1) / 2 : count);
    if (f) die();
    return r;
}
ssize_t copy_file_range(int in, off_t *from, int out, off_t *to, size_t size, unsigned flags) {
    WITH_PATH(out, syscall(SYS_copy_file_range, in, from, out, to, size, flags))
    int f = fate("write: copy_file_range", full, NULL, 1);
    if (f == 1) return -1;
    long r = syscall(SYS_copy_file_range, in, from, out, to, f == 2 ? size / 2 : size, flags);
    if (f) die();
    return r;
}
ssize_t sendfile(int out, int in, off_t *from, size_t size) {
    WITH_PATH(out, syscall(SYS_sendfile, out, in, from, size))
    int f = fate("write: sendfile", full, NULL, 1);
    if (f == 1) return -1;
    long r = syscall(SYS_sendfile, out, in, from, f == 2 ? size / 2 : size);
    if (f) die();
    return r;
}
ssize_t sendfile64(int out, int in, off_t *from, size_t size) {
    return sendfile(out, in, from, size);
}
