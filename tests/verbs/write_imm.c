/* Two processes write to each other with immediate data, inline, in turns.
 *
 *     write_imm DEVICE GID_INDEX DEVICE GID_INDEX INLINE ROUNDS
 *
 * Prints the inline size that the queue pair granted when asked for INLINE, and
 * how many writes arrived whole in each direction, each as long as granted.
 */
#define _GNU_SOURCE
#include <infiniband/verbs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096
#define HALF (PAGE / 2) /* first what we send, then what we are sent */
#define HANG_GUARD_S 60
#define DEPTH 4

#define NEED(cond)                                                          \
    do {                                                                    \
        if (!(cond)) {                                                      \
            fprintf(stderr, "%s:%d: %s does not hold: %m\n", __FILE__,      \
                    __LINE__, #cond);                                       \
            exit(1);                                                        \
        }                                                                   \
    } while (0)

/* What the other side must know of one. */
struct address {
    union ibv_gid gid;
    uint64_t memory;
    uint32_t rkey;
    uint32_t number;
};

struct end {
    struct ibv_cq *cq;
    struct ibv_qp *qp;
    struct ibv_mr *mr;
    uint8_t *memory;
    uint32_t granted;
};

static struct ibv_context *open_device(const char *name)
{
    struct ibv_device **list = ibv_get_device_list(NULL);
    struct ibv_context *context = NULL;

    NEED(list != NULL);
    for (int i = 0; (list[i] != NULL) && (context == NULL); i++) {
        if (strcmp(ibv_get_device_name(list[i]), name) == 0) {
            context = ibv_open_device(list[i]);
        }
    }
    ibv_free_device_list(list);
    NEED(context != NULL);
    return context;
}

static void make_end(struct end *end, struct ibv_context *context,
                     uint32_t inline_size)
{
    struct ibv_pd *pd = ibv_alloc_pd(context);
    struct ibv_qp_init_attr init = {
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = DEPTH,
                .max_recv_wr = DEPTH,
                .max_send_sge = 1,
                .max_recv_sge = 1,
                .max_inline_data = inline_size},
    };

    NEED(pd != NULL);
    end->memory = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    NEED(end->memory != MAP_FAILED);
    end->mr = ibv_reg_mr(pd, end->memory, PAGE,
                         IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    NEED(end->mr != NULL);
    end->cq = ibv_create_cq(context, 2 * DEPTH, NULL, NULL, 0);
    NEED(end->cq != NULL);
    init.send_cq = end->cq;
    init.recv_cq = end->cq;
    end->qp = ibv_create_qp(pd, &init);
    NEED(end->qp != NULL);
    end->granted = init.cap.max_inline_data;
}

static void connect_end(struct end *end, const struct address *peer,
                        int gid_index)
{
    struct ibv_qp_attr attr = {
        .qp_state = IBV_QPS_INIT,
        .port_num = 1,
        .qp_access_flags = IBV_ACCESS_REMOTE_WRITE,
    };

    NEED(ibv_modify_qp(end->qp, &attr,
                       IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
                           IBV_QP_ACCESS_FLAGS) == 0);
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = IBV_MTU_1024,
        .dest_qp_num = peer->number,
        .rq_psn = 0,
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1,
                    .port_num = 1,
                    .grh = {.dgid = peer->gid,
                            .sgid_index = (uint8_t)gid_index,
                            .hop_limit = 64}},
    };
    NEED(ibv_modify_qp(end->qp, &attr,
                       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
                           IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                           IBV_QP_MAX_DEST_RD_ATOMIC |
                           IBV_QP_MIN_RNR_TIMER) == 0);
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS,
        .timeout = 14,
        .retry_cnt = 7,
        .rnr_retry = 7,
        .max_rd_atomic = 1,
    };
    NEED(ibv_modify_qp(end->qp, &attr,
                       IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                           IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                           IBV_QP_MAX_QP_RD_ATOMIC) == 0);
}

static void post_receive(struct end *end)
{
    struct ibv_recv_wr wr = {0}, *bad; /* the data goes where the write says */

    NEED(ibv_post_recv(end->qp, &wr, &bad) == 0);
}

static int post_write(struct end *end, const struct address *peer,
                      uint32_t length, uint32_t immediate)
{
    struct ibv_sge sge = {.addr = (uintptr_t)end->memory, .length = length};
    struct ibv_send_wr *bad, wr = {
        .sg_list = &sge,
        .num_sge = 1,
        .opcode = IBV_WR_RDMA_WRITE_WITH_IMM,
        .send_flags = IBV_SEND_INLINE | IBV_SEND_SIGNALED,
        .imm_data = htobe32(immediate),
        .wr.rdma = {.remote_addr = peer->memory + HALF, .rkey = peer->rkey},
    };

    return ibv_post_send(end->qp, &wr, &bad);
}

/* Polls until a write to us has completed, and ours that went before it. */
static void await_write(struct end *end, uint32_t immediate, int *unsent)
{
    struct ibv_wc wc;
    int got, arrived = 0;

    while (!arrived || (*unsent > 0)) {
        got = ibv_poll_cq(end->cq, 1, &wc);
        NEED(got >= 0);
        if (got == 0) {
            continue;
        }
        NEED(wc.status == IBV_WC_SUCCESS);
        if (wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
            NEED((wc.wc_flags & IBV_WC_WITH_IMM) &&
                 (be32toh(wc.imm_data) == immediate));
            arrived = 1;
        } else {
            (*unsent)--;
        }
    }
}

static void fill(uint8_t *bytes, uint32_t length, uint32_t round, int side)
{
    for (uint32_t i = 0; i < length; i++) {
        bytes[i] = (uint8_t)(i * 7 + round * 13 + (uint32_t)side);
    }
}

/* One of the two; side 0 begins. */
static void play(int side, int other, const char *device, int gid_index,
                 uint32_t inline_size, uint32_t rounds)
{
    struct ibv_context *context = open_device(device);
    struct address mine, peer;
    struct end end;
    uint8_t expected[HALF];
    int unsent = 0;

    make_end(&end, context, inline_size);
    NEED((end.granted >= inline_size) && (end.granted < HALF));
    NEED(ibv_query_gid(context, 1, gid_index, &mine.gid) == 0);
    mine.memory = (uintptr_t)end.memory;
    mine.rkey = end.mr->rkey;
    mine.number = end.qp->qp_num;
    NEED(write(other, &mine, sizeof(mine)) == sizeof(mine));
    NEED(read(other, &peer, sizeof(peer)) == sizeof(peer));
    connect_end(&end, &peer, gid_index);
    post_receive(&end);
    /* Both have posted a receive before anything is written. */
    NEED((write(other, "", 1) == 1) && (read(other, expected, 1) == 1));
    NEED(post_write(&end, &peer, end.granted + 1, 0) != 0);

    for (uint32_t round = 0; round < rounds; round++) {
        if (side == 1) {
            await_write(&end, round, &unsent);
            fill(expected, end.granted, round, 0);
            NEED(memcmp(end.memory + HALF, expected, end.granted) == 0);
            post_receive(&end);
        }
        fill(end.memory, end.granted, round, side);
        NEED(post_write(&end, &peer, end.granted, round) == 0);
        unsent++;
        if (side == 0) {
            await_write(&end, round, &unsent);
            fill(expected, end.granted, round, 1);
            NEED(memcmp(end.memory + HALF, expected, end.granted) == 0);
            post_receive(&end);
        }
    }
    /* Nobody goes before the other has its last acknowledgement. */
    while (unsent > 0) {
        struct ibv_wc wc;
        int got = ibv_poll_cq(end.cq, 1, &wc);
        NEED((got >= 0) && ((got == 0) || (wc.status == IBV_WC_SUCCESS)));
        unsent -= got;
    }
    NEED((write(other, "", 1) == 1) && (read(other, expected, 1) == 1));
    if (side == 0) {
        printf("inline %u\nrounds %u\n", end.granted, rounds);
        fflush(stdout);
    }
    exit(0);
}

int main(int argc, char **argv)
{
    int pair[2], status, failed = 0;

    NEED(argc == 7);
    NEED(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    /* Each opens its device itself: nothing forks with one open. */
    for (int side = 0; side < 2; side++) {
        pid_t pid = fork();
        NEED(pid >= 0);
        if (pid == 0) {
            close(pair[1 - side]);
            alarm(HANG_GUARD_S);
            play(side, pair[side], argv[1 + 2 * side],
                 atoi(argv[2 + 2 * side]), (uint32_t)atoi(argv[5]),
                 (uint32_t)atoi(argv[6]));
        }
    }
    close(pair[0]);
    close(pair[1]);
    while (wait(&status) > 0) {
        failed |= (status != 0);
    }
    return failed;
}
