/* What the C kernels share: vectors, a product of small matrices, and tasks on XLA's threads. */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define ROWS 8 /* rows of a product that are in registers at a time, times COLUMNS vectors */
/* The larger one; b if one is not a number. */
#define LARGER(a, b) ((Vector)_mm512_max_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define ROWS 4
#define LARGER(a, b) ((Vector)_mm256_max_ps((__m256)(a), (__m256)(b)))
#else
#define LANES 4
#define ROWS 8
#define LARGER(a, b) ((Vector)(((Integers)(a) & ((a) > (b))) | ((Integers)(b) & ~((a) > (b)))))
#endif
#define COLUMNS 2
#define QUERIES (LANES * COLUMNS)
#define MASKED -1e30f
#define LOG2_E 1.4426950408889634f

typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

INLINE Vector all(float x) { return x - (Vector){0}; }
INLINE Vector load(const float *p) { return *(const Vector *)p; }
INLINE void store(float *p, Vector x) { *(Vector *)p = x; }

/* 2^x for x <= 0, within 2 units of the last place; what is below 2^-126 becomes 2^-126, and NaN stays NaN. */
INLINE Vector power_of_2(Vector x) {
    const Vector magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer, in the lowest bits */
    x = LARGER(all(-126.0f), x);
    const Vector shifted = x + magic, r = x - (shifted - magic);
    Vector p = all(1.5403530e-4f);
    p = p * r + all(1.3333558e-3f);
    p = p * r + all(9.6181291e-3f);
    p = p * r + all(5.5504109e-2f);
    p = p * r + all(2.4022651e-1f);
    p = p * r + all(6.9314718e-1f);
    p = p * r + all(1.0f);
    return p * (Vector)(((Integers)shifted << 23) + 0x3f800000);
}

/* c (rows x columns vectors) = or += a (rows x depth) b (depth x columns vectors); strides in floats. */
INLINE void tile(const int rows, const int columns, int depth, const float *a, const int64_t a_row,
                 const int64_t a_depth, const float *b, int64_t b_row, float *c, int64_t c_row, const int add) {
    Vector sum[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < columns; j++)
            sum[i][j] = add ? load(c + i * c_row + j * LANES) : all(0.0f);
    for (int k = 0; k < depth; k++) {
        Vector right[COLUMNS];
        UNROLL for (int j = 0; j < columns; j++) right[j] = load(b + k * b_row + j * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            const Vector left = all(a[i * a_row + k * a_depth]);
            UNROLL for (int j = 0; j < columns; j++) sum[i][j] += left * right[j];
        }
    }
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int j = 0; j < columns; j++) store(c + i * c_row + j * LANES, sum[i][j]);
}

INLINE void product(int rows, int vectors, int depth, const float *a, const int64_t a_row, const int64_t a_depth,
                    const float *b, int64_t b_row, float *c, int64_t c_row, const int add) {
    int j = 0;
#define STRIP(columns)                                                                                             \
    {                                                                                                              \
        int i = 0;                                                                                                 \
        for (; i + ROWS <= rows; i += ROWS)                                                                        \
            tile(ROWS, columns, depth, a + i * a_row, a_row, a_depth, b + j * LANES, b_row,                        \
                 c + i * c_row + j * LANES, c_row, add);                                                           \
        for (; i + 4 <= rows; i += 4)                                                                              \
            tile(4, columns, depth, a + i * a_row, a_row, a_depth, b + j * LANES, b_row,                           \
                 c + i * c_row + j * LANES, c_row, add);                                                           \
        for (; i < rows; i++)                                                                                      \
            tile(1, columns, depth, a + i * a_row, a_row, a_depth, b + j * LANES, b_row,                           \
                 c + i * c_row + j * LANES, c_row, add);                                                           \
    }
    for (; j + COLUMNS <= vectors; j += COLUMNS) STRIP(COLUMNS)
    for (; j < vectors; j++) STRIP(1)
#undef STRIP
}

INLINE Vector choose(Integers mask, Vector yes, Vector no) {
    return (Vector)((mask & (Integers)yes) | (~mask & (Integers)no));
}

static float *take(float **memory, int64_t count) {
    float *p = *memory;
    *memory += (count + 15) / 16 * 16;
    return p;
}

/* Runs tasks on XLA's threads. The calling thread works, too, and waits only for tasks that others have begun, so that
   it is never blocked by a pool without a free thread. */
typedef void Task(const void *call, int64_t task, float *memory);

typedef struct {
    const void *call;
    Task *run;
    int64_t tasks, scratch;
    atomic_llong next;
    atomic_int failed;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    int64_t finished;
    int references;
} Job;

static void release(Job *job) {
    pthread_mutex_lock(&job->lock);
    const int left = --job->references;
    pthread_mutex_unlock(&job->lock);
    if (left) return;
    pthread_mutex_destroy(&job->lock);
    pthread_cond_destroy(&job->changed);
    free(job);
}

static void work(void *data) {
    Job *job = data;
    int64_t done = 0, task = atomic_fetch_add(&job->next, 1);
    float *memory = NULL;
    if (task < job->tasks && posix_memalign((void **)&memory, 64, sizeof(float) * job->scratch)) memory = NULL;
    for (; task < job->tasks; task = atomic_fetch_add(&job->next, 1), done++) {
        if (memory) job->run(job->call, task, memory);
        else atomic_store(&job->failed, 1);
    }
    free(memory);
    pthread_mutex_lock(&job->lock);
    job->finished += done;
    if (job->finished == job->tasks) pthread_cond_signal(&job->changed);
    pthread_mutex_unlock(&job->lock);
    release(job);
}

static XLA_FFI_Error *fail(XLA_FFI_CallFrame *frame, const char *message, XLA_FFI_Error_Code code) {
    XLA_FFI_Error_Create_Args args = {sizeof args, NULL, message, code};
    return frame->api->XLA_FFI_Error_Create(&args);
}

/* Runs tasks 0, 1, ..., each with memory for `scratch` floats, on up to `most` threads. */
static XLA_FFI_Error *run(XLA_FFI_CallFrame *frame, const void *call, Task *task, int64_t tasks, int64_t scratch,
                          int64_t most) {
    Job *job = malloc(sizeof *job);
    if (!job) return fail(frame, "no memory for a kernel", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED);
    job->call = call, job->run = task, job->tasks = tasks, job->scratch = scratch, job->finished = 0;
    atomic_init(&job->next, 0), atomic_init(&job->failed, 0);
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->changed, NULL);
    int64_t threads = 1;
    XLA_FFI_ThreadPool_NumThreads_Args count = {sizeof count, NULL, frame->ctx, &threads};
    XLA_FFI_Error *error = frame->api->XLA_FFI_ThreadPool_NumThreads(&count);
    if (error) { /* there is no pool */
        XLA_FFI_Error_Destroy_Args destroy = {sizeof destroy, NULL, error};
        frame->api->XLA_FFI_Error_Destroy(&destroy);
        threads = 1;
    }
    int64_t helpers = (threads < tasks ? threads : tasks) - 1;
    if (helpers > most - 1) helpers = most - 1;
    job->references = 2 + (int)helpers; /* the helpers, this function's `work`, and this function */
    for (int64_t i = 0; i < helpers; i++) {
        XLA_FFI_ThreadPool_Schedule_Args schedule = {sizeof schedule, NULL, frame->ctx, work, job};
        if ((error = frame->api->XLA_FFI_ThreadPool_Schedule(&schedule))) {
            XLA_FFI_Error_Destroy_Args destroy = {sizeof destroy, NULL, error};
            frame->api->XLA_FFI_Error_Destroy(&destroy);
            release(job);
        }
    }
    work(job);
    pthread_mutex_lock(&job->lock);
    while (job->finished < job->tasks) pthread_cond_wait(&job->changed, &job->lock);
    pthread_mutex_unlock(&job->lock);
    const int failed = atomic_load(&job->failed);
    release(job);
    return failed ? fail(frame, "no memory for a kernel", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED) : NULL;
}

/* Answers XLA's question for the version of the interface; whether this call is that question. */
static int is_question(XLA_FFI_CallFrame *frame) {
    if (!frame->extension_start || frame->extension_start->type != XLA_FFI_Extension_Metadata) return 0;
    XLA_FFI_Metadata *metadata = ((struct XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return 1;
}

static XLA_FFI_Buffer *argument(XLA_FFI_CallFrame *frame, int i) { return frame->args.args[i]; }
static void *result(XLA_FFI_CallFrame *frame, int i) { return ((XLA_FFI_Buffer *)frame->rets.rets[i])->data; }

