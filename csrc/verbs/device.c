/*
 * Which device, port and address to use, and what doctor says of them.
 *
 * A process opens a device at its first attach, never before: nothing forks
 * once one is open. Should a user's code fork a rank nevertheless, a child must
 * not take pages that a device writes to: ours are shared with children, or
 * kept from them, and the provider's queues are left alone by kernels that copy
 * pinned pages at fork (5.12 and later). On others libibverbs is asked to keep
 * everything registered from children; they can't read our arenas then.
 */
#define _GNU_SOURCE
#include "verbs.h"

#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

static _Thread_local char why[RFM_VERBS_WHY];

const char *rfm_verbs_why(void)
{
    return (why[0] != 0) ? why : NULL;
}

void rfm_verbs_begin(void)
{
    why[0] = 0;
}

int rfm_verbs_fail(int status, const char *format, ...)
{
    va_list args;

    va_start(args, format);
    vsnprintf(why, sizeof(why), format, args);
    va_end(args);
    return status;
}

int rfm_verbs_no_memory(uint64_t bytes)
{
    int error = errno;
    char limit[32] = "unlimited";
    struct rlimit lock;

    if ((getrlimit(RLIMIT_MEMLOCK, &lock) == 0) &&
        (lock.rlim_cur != RLIM_INFINITY)) {
        snprintf(limit, sizeof(limit), "%llu KiB",
                 (unsigned long long)lock.rlim_cur / 1024);
    }
    return rfm_verbs_fail(
        (error == ENOMEM) ? RFM_ERR_NO_MEMORY : RFM_ERR_NO_RESOURCE,
        "%llu KiB could not be registered with the RDMA device: %s; the limit "
        "of locked memory is %s; raise it: `ulimit -l unlimited`, "
        "LimitMEMLOCK=infinity in the systemd unit, or `* - memlock unlimited` "
        "in /etc/security/limits.conf",
        (unsigned long long)(bytes + 1023) / 1024, strerror(error), limit);
}

/* --- choosing --------------------------------------------------------------- */

struct wish {
    char name[64];              /* empty: any */
    int  port;                  /* 0: any */
    int  gid_index;             /* -1: any */
};

static bool number_of(const char *text, const char *end, long most, int *to)
{
    char *stop;
    long n;

    errno = 0;
    n     = strtol(text, &stop, 10);
    if ((stop == text) || (stop != end) || (errno != 0) || (n < 0) ||
        (n > most)) {
        return false;
    }
    *to = (int)n;
    return true;
}

static bool read_wish(const char *spec, struct wish *wish)
{
    const char *port;
    const char *gid;
    size_t n;

    *wish = (struct wish){ .gid_index = -1 };
    if ((spec == NULL) || (spec[0] == 0)) {
        return true;
    }
    port = strchr(spec, ':');
    n    = (port != NULL) ? (size_t)(port - spec) : strlen(spec);
    if (n >= sizeof(wish->name)) {
        return false;
    }
    memcpy(wish->name, spec, n);
    if (port == NULL) {
        return true;
    }
    gid = strchr(++port, ':');
    if (!number_of(port, (gid != NULL) ? gid : port + strlen(port), UINT8_MAX,
                   &wish->port)) {
        return false;
    }
    return (gid == NULL) ||
           number_of(gid + 1, gid + 1 + strlen(gid + 1), INT_MAX,
                     &wish->gid_index);
}

static bool is_mapped_ipv4(const union ibv_gid *gid)
{
    static const uint8_t mapped[12] = { [10] = 0xff, [11] = 0xff };

    return memcmp(gid->raw, mapped, sizeof(mapped)) == 0;
}

/* what is routed comes before what is not; 0: no use */
static int worth(const struct ibv_gid_entry *entry)
{
    switch (entry->gid_type) {
    case IBV_GID_TYPE_ROCE_V2:
        if (is_mapped_ipv4(&entry->gid)) {
            return 4;
        }
        return ((entry->gid.raw[0] == 0xfe) &&
                ((entry->gid.raw[1] & 0xc0) == 0x80))
                   ? 2
                   : 3;
    case IBV_GID_TYPE_ROCE_V1:
        return 1;
    default:
        return 0;
    }
}

/* the address of a port that is up */
static bool pick_gid(struct verbs_device *dev, const struct wish *wish)
{
    bool ethernet = dev->attr.link_layer == IBV_LINK_LAYER_ETHERNET;
    int best = 0;

    for (int i = 0; i < dev->attr.gid_tbl_len; i++) {
        struct ibv_gid_entry entry;
        int found;

        if ((wish->gid_index >= 0) && (wish->gid_index != i)) {
            continue;
        }
        if (ibv_query_gid_ex(dev->ctx, dev->port, (uint32_t)i, &entry, 0) != 0) {
            continue;
        }
        found = ethernet ? worth(&entry) : 1;
        if (found > best) {
            best           = found;
            dev->gid_index = i;
            dev->gid       = entry.gid;
            dev->path      = !ethernet ? RFM_VERBS_INFINIBAND
                             : (entry.gid_type == IBV_GID_TYPE_ROCE_V2)
                                 ? RFM_VERBS_ROCE_V2
                                 : RFM_VERBS_ROCE_V1;
        }
    }
    return best > 0;
}

/* RFM_OK, or what is the matter with this one */
static int try_device(struct ibv_device *device, const struct wish *wish,
                      struct verbs_device *dev)
{
    int rc;

    dev->ctx = ibv_open_device(device);
    if (dev->ctx == NULL) {
        return rfm_verbs_fail(RFM_ERR_SYSTEM, "%s can't be opened: %s",
                              ibv_get_device_name(device), strerror(errno));
    }
    snprintf(dev->name, sizeof(dev->name), "%s", ibv_get_device_name(device));
    rc = ibv_query_device(dev->ctx, &dev->limits);
    if (rc != 0) {
        rc = rfm_verbs_fail(RFM_ERR_SYSTEM, "%s says nothing of itself: %s",
                            dev->name, strerror(rc));
        goto err_close;
    }
    rc = rfm_verbs_fail(RFM_ERR_NO_RESOURCE, "%s has no port%s that is up",
                        dev->name, (wish->port != 0) ? " of that number" : "");
    for (int port = 1; port <= dev->limits.phys_port_cnt; port++) {
        if (((wish->port != 0) && (wish->port != port)) ||
            (ibv_query_port(dev->ctx, (uint8_t)port, &dev->attr) != 0) ||
            (dev->attr.state != IBV_PORT_ACTIVE)) {
            continue;
        }
        dev->port = (uint8_t)port;
        if (pick_gid(dev, wish)) {
            return RFM_OK;
        }
        rc = rfm_verbs_fail(RFM_ERR_NO_RESOURCE,
                            "port %d of %s has no address%s to use", port,
                            dev->name,
                            (wish->gid_index >= 0) ? " of that number" : "");
    }

err_close:
    ibv_close_device(dev->ctx);
    dev->ctx = NULL;
    return rc;
}

/* Looked up in sysfs, so that nothing is opened; what isn't there is found out
 * when the device is. */
static bool has_active_port(const struct ibv_device *device)
{
    for (int port = 1; port <= UINT8_MAX; port++) {
        char path[IBV_SYSFS_PATH_MAX + 64];
        char state[64] = "";
        FILE *file;

        snprintf(path, sizeof(path), "%s/ports/%d/state", device->ibdev_path,
                 port);
        file = fopen(path, "re");
        if (file == NULL) {
            return port == 1;
        }
        if (fgets(state, sizeof(state), file) == NULL) {
            state[0] = 0;
        }
        fclose(file);
        if (strstr(state, "ACTIVE") != NULL) {
            return true;
        }
    }
    return false;
}

const char *rfm_verbs_unusable(void)
{
    const char *reason = "there is no RDMA device here";
    struct ibv_device **list;
    int n = 0;

    list = ibv_get_device_list(&n);
    for (int i = 0; (list != NULL) && (i < n); i++) {
        if (list[i]->transport_type == IBV_TRANSPORT_IWARP) {
            reason = "iWARP devices have no write with immediate";
        } else if (!has_active_port(list[i])) {
            reason = "no port of an RDMA device is up";
        } else {
            reason = NULL;
            break;
        }
    }
    if (list != NULL) {
        ibv_free_device_list(list);
    }
    return reason;
}

int rfm_verbs_open(const char *spec, struct verbs_device *dev)
{
    struct ibv_device **list;
    struct wish wish;
    int n;
    int rc;

    rfm_verbs_begin();
    if ((spec == NULL) || (spec[0] == 0)) {
        spec = getenv("RFAAS_DEVICE");
    }
    if (!read_wish(spec, &wish)) {
        return rfm_verbs_fail(RFM_ERR_INVALID,
                              "%.64s names no device: name[:port[:gid index]]",
                              spec);
    }
    if (ibv_is_fork_initialized() == IBV_FORK_DISABLED) {
        (void)ibv_fork_init();
    }
    list = ibv_get_device_list(&n);
    if (list == NULL) {
        return rfm_verbs_fail(RFM_ERR_SYSTEM, "RDMA devices can't be listed: %s",
                              strerror(errno));
    }
    rc = (wish.name[0] != 0)
             ? rfm_verbs_fail(RFM_ERR_NO_RESOURCE,
                              "there is no RDMA device %.64s", wish.name)
             : rfm_verbs_fail(RFM_ERR_NO_RESOURCE, "there is no RDMA device");
    for (int i = 0; i < n; i++) {
        if ((wish.name[0] != 0) &&
            (strcmp(wish.name, ibv_get_device_name(list[i])) != 0)) {
            continue;
        }
        if (list[i]->transport_type == IBV_TRANSPORT_IWARP) {
            rc = rfm_verbs_fail(RFM_ERR_NO_RESOURCE,
                                "%s is iWARP, which has no write with immediate",
                                ibv_get_device_name(list[i]));
            continue;
        }
        memset(dev, 0, sizeof(*dev));
        rc = try_device(list[i], &wish, dev);
        if (rc == RFM_OK) {
            break;
        }
    }
    ibv_free_device_list(list);
    return rc;
}

void rfm_verbs_close(struct verbs_device *dev)
{
    (void)ibv_close_device(dev->ctx);
    dev->ctx = NULL;
}

/* --- for doctor ------------------------------------------------------------- */

static const char *path_text(uint8_t path)
{
    switch (path) {
    case RFM_VERBS_INFINIBAND:
        return "InfiniBand";
    case RFM_VERBS_ROCE_V1:
        return "RoCE v1";
    default:
        return "RoCE v2";
    }
}

static void gid_text(const union ibv_gid *gid, char *text, size_t bytes)
{
    const char *from = inet_ntop(AF_INET6, gid->raw, text, (socklen_t)bytes);

    if (from == NULL) {
        text[0] = 0;
    }
}

int rfm_verbs_describe(const char *spec, char *text, uint64_t bytes)
{
    struct rfm_side_attr side_attr = { .rank = true, .device = spec };
    struct rfm_link_attr attr = { .slots = 16, .slot_bytes = 1024,
                                  .data_fd = -1 };
    char gid[INET6_ADDRSTRLEN];
    char lock[32] = "unlimited";
    struct verbs_side *side;
    struct verbs_link *v;
    struct rlimit limit;
    int rc;

    rc = rfm_verbs_side_open(&side_attr, &attr.side);
    if (rc < 0) {
        return rc;
    }
    rc = rfm_verbs_link_make(&attr, true, &v);
    if (rc < 0) {
        goto out;
    }
    if ((getrlimit(RLIMIT_MEMLOCK, &limit) == 0) &&
        (limit.rlim_cur != RLIM_INFINITY)) {
        snprintf(lock, sizeof(lock), "%llu",
                 (unsigned long long)limit.rlim_cur);
    }
    side = (struct verbs_side *)attr.side;
    gid_text(&side->dev.gid, gid, sizeof(gid));
    rc = snprintf(
        text, bytes,
        "device=%s\nport=%u\nstate=active\npath=%s\ngid_index=%d\ngid=%s\n"
        "lid=%u\nmtu=%u\ninline_bytes=%u\nmax_qp=%d\nmax_qp_wr=%d\nmax_cqe=%d\n"
        "max_mr_bytes=%llu\nmax_write_bytes=%llu\nmemlock_bytes=%s\n"
        "firmware=%.64s\nfork=%s\n",
        side->dev.name, side->dev.port, path_text(side->dev.path),
        side->dev.gid_index, gid, side->dev.attr.lid,
        128u << side->dev.attr.active_mtu, v->inline_bytes,
        side->dev.limits.max_qp, side->dev.limits.max_qp_wr,
        side->dev.limits.max_cqe,
        (unsigned long long)side->dev.limits.max_mr_size,
        (unsigned long long)v->max_write, lock, side->dev.limits.fw_ver,
        (ibv_is_fork_initialized() == IBV_FORK_UNNEEDED) ? "the kernel copies"
        : (ibv_is_fork_initialized() == IBV_FORK_ENABLED)
            ? "kept from children"
            : "unprotected");
    rfm_verbs_link_close(&v->link);
out:
    rfm_verbs_side_close(attr.side);
    return rc;
}
