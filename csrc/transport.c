/* Which transports there are: two are built in, others are plug-ins. */
#define _GNU_SOURCE
#include "rfm_transport.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "poller.h"

static const struct rfm_transport *loaded[RFM_TRANSPORTS];
static char *plugins[RFM_TRANSPORTS];
static pthread_mutex_t load_lock = PTHREAD_MUTEX_INITIALIZER;
static char load_error[512];

static int load(const char *path, const char **why_p);

/* one that isn't built in; loaded when it is first asked for */
static const struct rfm_transport *find_plugin(uint32_t number,
                                               const char **why_p)
{
    const struct rfm_transport *ops = rfm_load_acquire(&loaded[number]);

    if (ops == NULL) {
        pthread_mutex_lock(&load_lock);
        *why_p = "it was not built here";
        if (plugins[number] != NULL) {
            (void)load(plugins[number], why_p);
        }
        ops = rfm_load_acquire(&loaded[number]);
        pthread_mutex_unlock(&load_lock);
    }
    return ops;
}

const struct rfm_transport *rfm_transport_find(uint32_t number)
{
    const char *why;

    switch (number) {
    case RFM_TRANSPORT_SHM:
        return &rfm_shm;
    case RFM_TRANSPORT_TCP:
        return &rfm_tcp;
    default:
        return (number < RFM_TRANSPORTS) ? find_plugin(number, &why) : NULL;
    }
}

int rfm_transport_plugin(uint32_t number, const char *path)
{
    char *copy = strdup(path);

    if ((copy == NULL) || (number >= RFM_TRANSPORTS)) {
        free(copy);
        return RFM_ERR_INVALID;
    }
    pthread_mutex_lock(&load_lock);
    free(plugins[number]);
    plugins[number] = copy;
    pthread_mutex_unlock(&load_lock);
    return RFM_OK;
}

int rfm_transport_usable(uint32_t number, const char **why_p)
{
    if (number <= RFM_TRANSPORT_TCP) {
        return RFM_OK;
    }
    if (number >= RFM_TRANSPORTS) {
        *why_p = "there is no such transport";
        return RFM_ERR_INVALID;
    }
    return (find_plugin(number, why_p) != NULL) ? RFM_OK : RFM_ERR_NO_RESOURCE;
}

int rfm_transport_describe(uint32_t number, const char *device, char *text,
                           uint64_t bytes, const char **why_p)
{
    const struct rfm_transport *ops;
    int rc;

    *why_p = "there is nothing to describe";
    ops    = (number > RFM_TRANSPORT_TCP) && (number < RFM_TRANSPORTS)
                 ? find_plugin(number, why_p)
                 : NULL;
    if ((ops == NULL) || (ops->describe == NULL)) {
        return RFM_ERR_NO_RESOURCE;
    }
    rc = ops->describe(device, text, bytes);
    if (rc < 0) {
        *why_p = (ops->why != NULL) ? ops->why() : NULL;
    }
    return rc;
}

/* lock held */
static int load(const char *path, const char **why_p)
{
    static const struct rfm_core core = {
        .version         = RFM_PLUGIN_VERSION,
        .protocol        = RFM_PROTOCOL,
        .transport_bytes = sizeof(struct rfm_transport),
        .now_ns          = rfm_now_ns,
    };
    const struct rfm_transport *ops;
    rfm_plugin_fn *entry;
    void *library;

    /* never unloaded: its threads and ours may be inside it at any time */
    library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library == NULL) {
        snprintf(load_error, sizeof(load_error), "%s", dlerror());
        *why_p = load_error;
        return RFM_ERR_SYSTEM;
    }
    *(void **)&entry = dlsym(library, RFM_PLUGIN_ENTRY);
    if (entry == NULL) {
        snprintf(load_error, sizeof(load_error), "%s is no transport of ours",
                 path);
        *why_p = load_error;
        return RFM_ERR_INVALID;
    }
    ops = entry(&core, why_p);
    if (ops == NULL) {
        return RFM_ERR_NO_RESOURCE;
    }
    if ((ops->number <= RFM_TRANSPORT_TCP) || (ops->number >= RFM_TRANSPORTS)) {
        *why_p = "a plug-in with the number of another transport";
        return RFM_ERR_INVALID;
    }
    rfm_store_release(&loaded[ops->number], ops);
    return RFM_OK;
}

int rfm_transport_load(const char *path, const char **why_p)
{
    int rc;

    pthread_mutex_lock(&load_lock);
    rc = load(path, why_p);
    pthread_mutex_unlock(&load_lock);
    return rc;
}
