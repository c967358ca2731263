/* The Python module: parse, check sizes, release the GIL, call through the live table.
 *
 * Tensors come as addresses and bytes, so that nothing here knows torch. What is wrong becomes a
 * ValueError; kernels/cpu.py has checked already what a user can get wrong.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "attention.h"
#include "gram.h"
#include "head.h"
#include "isa.h"
#include "nearest.h"
#include "norm.h"
#include "pool.h"
#include "product.h"
#include "spans.h"

typedef unsigned long long address;

#define AT(type, number) ((type *)(uintptr_t)(number))

static PyObject *answer(enum uc_status status) {
    if (status == UC_OK)
        Py_RETURN_NONE;
    if (status == UC_NO_MEMORY)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, uc_sentence(status));
    return NULL;
}

static PyObject *names(int (*wanted)(const struct uc_isa *)) {
    PyObject *list = PyList_New(0);
    const struct uc_isa *isa;
    for (unsigned i = 0; list && (isa = uc_isa_at(i)) != NULL; i++) {
        if (wanted && !wanted(isa))
            continue;
        PyObject *name = PyUnicode_FromString(isa->name);
        if (!name || PyList_Append(list, name) != 0)
            Py_CLEAR(list);
        Py_XDECREF(name);
    }
    PyObject *tuple = list ? PyList_AsTuple(list) : NULL;
    Py_XDECREF(list);
    return tuple;
}

static PyObject *known(PyObject *self, PyObject *nothing) {
    (void)self, (void)nothing;
    return names(NULL);
}

static PyObject *usable(PyObject *self, PyObject *nothing) {
    (void)self, (void)nothing;
    return names(uc_isa_usable);
}

static PyObject *isa(PyObject *self, PyObject *nothing) {
    (void)self, (void)nothing;
    return PyUnicode_FromString(uc_isa_live()->name);
}

static PyObject *use(PyObject *self, PyObject *args) {
    (void)self;
    const char *name;
    if (!PyArg_ParseTuple(args, "s", &name))
        return NULL;
    return answer(uc_isa_use(name));
}

static PyObject *share(PyObject *self, PyObject *args) {
    (void)self;
    address start, size;
    if (!PyArg_ParseTuple(args, "KK", &start, &size))
        return NULL;
    const int both = start && size;
    uc_pool_share(both ? (uc_team *)(uintptr_t)start : NULL, (uc_team_size *)(uintptr_t)size);
    Py_RETURN_NONE;
}

static PyObject *linear(PyObject *self, PyObject *args) {
    (void)self;
    address x, weight, bias, out;
    Py_ssize_t x_bytes, weight_bytes, bias_bytes, out_bytes, tokens;
    long long rows, columns, group;
    int dtype, kind, symmetric, scale_dtype, exact;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KnKnKnKnniiLLLiiiI", &x, &x_bytes, &weight, &weight_bytes, &bias,
                          &bias_bytes, &out, &out_bytes, &tokens, &dtype, &kind, &rows, &columns,
                          &group, &symmetric, &scale_dtype, &exact, &threads))
        return NULL;
    struct uc_layout layout;
    enum uc_status status =
        uc_layout_of(&layout, kind, rows, columns, group, symmetric, scale_dtype);
    if (status != UC_OK)
        return answer(status);
    if (x_bytes < 0 || tokens < 0)
        return answer(UC_BAD_INPUT_BYTES);
    struct uc_product product = {.x = AT(const uint8_t, x),
                                 .x_bytes = (size_t)x_bytes,
                                 .weight = AT(const uint8_t, weight),
                                 .weight_bytes = (size_t)weight_bytes,
                                 .bias = AT(const uint8_t, bias),
                                 .bias_bytes = (size_t)bias_bytes,
                                 .out = AT(uint8_t, out),
                                 .out_bytes = (size_t)out_bytes,
                                 .tokens = (size_t)tokens,
                                 .dtype = dtype,
                                 .exact = exact != 0,
                                 .threads = threads ? threads : 1};
    PyThreadState *python = PyEval_SaveThread();
    status = uc_linear(&layout, &product);
    PyEval_RestoreThread(python);
    return answer(status);
}

static PyObject *block(PyObject *self, PyObject *args) {
    (void)self;
    address codes, scales, zeros, data;
    Py_ssize_t codes_bytes, scales_bytes, zeros_bytes, data_bytes;
    long long rows, columns, group;
    int kind, symmetric, scale_dtype;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KnKnKnKniLLLiiI", &codes, &codes_bytes, &scales, &scales_bytes,
                          &zeros, &zeros_bytes, &data, &data_bytes, &kind, &rows, &columns, &group,
                          &symmetric, &scale_dtype, &threads))
        return NULL;
    struct uc_layout layout;
    enum uc_status status =
        uc_layout_of(&layout, kind, rows, columns, group, symmetric, scale_dtype);
    if (status != UC_OK)
        return answer(status);
    size_t wide = layout.rows * layout.groups;
    if ((size_t)codes_bytes != layout.rows * layout.columns ||
        (size_t)scales_bytes != wide * uc_bytes_of(layout.scale_dtype) ||
        (size_t)zeros_bytes != (layout.symmetric ? 0 : wide))
        return answer(UC_BAD_INPUT_BYTES);
    if ((size_t)data_bytes != layout.bytes)
        return answer(UC_BAD_WEIGHT_BYTES);
    PyThreadState *python = PyEval_SaveThread();
    status = uc_block(&layout, AT(const int8_t, codes), AT(const uint8_t, scales),
                      AT(const int8_t, zeros), AT(uint8_t, data), threads);
    PyEval_RestoreThread(python);
    return answer(status);
}

static PyObject *nearest(PyObject *self, PyObject *args) {
    (void)self;
    address goal, block, unit, scale, zero, group, codes, clipped;
    Py_ssize_t stride, steps, rows, groups;
    int low, high;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KKKnKKKKKnnniiI", &goal, &block, &unit, &stride, &scale, &zero,
                          &group, &codes, &clipped, &steps, &rows, &groups, &low, &high, &threads))
        return NULL;
    if (steps < 0 || rows < 0 || groups < 0 || stride < steps || low < -128 || high > 127) {
        PyErr_SetString(PyExc_ValueError, "sizes or codes out of range");
        return NULL;
    }
    const struct uc_nearest own = {.steps = (size_t)steps,
                                   .rows = (size_t)rows,
                                   .groups = (size_t)groups,
                                   .goal = AT(float, goal),
                                   .block = AT(float, block),
                                   .unit = AT(const float, unit),
                                   .stride = (size_t)stride,
                                   .scale = AT(const float, scale),
                                   .zero = AT(const float, zero),
                                   .group = AT(const int32_t, group),
                                   .low = (float)low,
                                   .high = (float)high,
                                   .codes = AT(int8_t, codes),
                                   .clipped = AT(int64_t, clipped)};
    int done;
    PyThreadState *python = PyEval_SaveThread();
    done = uc_nearest(&own, threads ? threads : 1);
    PyEval_RestoreThread(python);
    if (done)
        Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "a column's group is out of range");
    return NULL;
}

static PyObject *gram_usable(PyObject *self, PyObject *args) {
    (void)self, (void)args;
    return PyBool_FromLong(uc_gram_usable());
}

static PyObject *gram(PyObject *self, PyObject *args) {
    (void)self;
    address left, right, total;
    Py_ssize_t tokens, rows, columns;
    int upper;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KKKnnniI", &left, &right, &total, &tokens, &rows, &columns, &upper,
                          &threads))
        return NULL;
    if (tokens < 0 || rows < 0 || columns < 0 || (upper && rows != columns)) {
        PyErr_SetString(PyExc_ValueError, "sizes out of range");
        return NULL;
    }
    if (!uc_gram_usable()) {
        PyErr_SetString(PyExc_ValueError, "this processor has no bfloat16 instructions");
        return NULL;
    }
    const struct uc_gram own = {.tokens = (size_t)tokens,
                                .rows = (size_t)rows,
                                .columns = (size_t)columns,
                                .left = AT(const uint16_t, left),
                                .right = AT(const uint16_t, right),
                                .total = AT(float, total),
                                .upper = upper};
    int done;
    PyThreadState *python = PyEval_SaveThread();
    done = uc_gram(&own, threads ? threads : 1);
    PyEval_RestoreThread(python);
    if (done)
        Py_RETURN_NONE;
    return PyErr_NoMemory();
}

static PyObject *spans(PyObject *self, PyObject *args) {
    (void)self;
    address weight, cost, shares, scale, zero;
    Py_ssize_t rows, columns, group;
    int polish, symmetric, low, high;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KKKKKnnniiiiI", &weight, &cost, &shares, &scale, &zero, &rows,
                          &columns, &group, &polish, &symmetric, &low, &high, &threads))
        return NULL;
    if (rows < 0 || columns < 0 || group < 1 || low < -128 || high > 127 || low >= high) {
        PyErr_SetString(PyExc_ValueError, "sizes or codes out of range");
        return NULL;
    }
    const struct uc_spans own = {.rows = (size_t)rows,
                                 .columns = (size_t)columns,
                                 .group = (size_t)group,
                                 .weight = AT(const float, weight),
                                 .cost = AT(const float, cost),
                                 .shares = AT(const float, shares),
                                 .polish = polish,
                                 .symmetric = symmetric,
                                 .low = (float)low,
                                 .high = (float)high,
                                 .scale = AT(float, scale),
                                 .zero = AT(float, zero)};
    PyThreadState *python = PyEval_SaveThread();
    uc_spans(&own, threads ? threads : 1);
    PyEval_RestoreThread(python);
    Py_RETURN_NONE;
}

static PyObject *attend(PyObject *args, int (*usable)(void),
                        int (*compute)(const struct uc_attention *, unsigned)) {
    address query, key, value, out;
    Py_ssize_t strides[3][3], batch, heads, key_heads, tokens, width;
    float scale;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "K(nnn)K(nnn)K(nnn)KnnnnnfI", &query, &strides[0][0],
                          &strides[0][1], &strides[0][2], &key, &strides[1][0], &strides[1][1],
                          &strides[1][2], &value, &strides[2][0], &strides[2][1], &strides[2][2],
                          &out, &batch, &heads, &key_heads, &tokens, &width, &scale, &threads))
        return NULL;
    int wrong = batch < 0 || key_heads < 1 || heads < key_heads || heads % key_heads ||
                tokens < 0 || width < 1 || width % UC_WIDTH_STEP || width > UC_WIDTH_MAX;
    for (int i = 0; i < 9; i++)
        wrong |= strides[i / 3][i % 3] < 0;
    if (wrong || !usable()) {
        PyErr_SetString(PyExc_ValueError, "sizes out of range, or not the instructions");
        return NULL;
    }
    struct uc_heads given[3];
    const address data[3] = {query, key, value};
    for (int i = 0; i < 3; i++)
        given[i] = (struct uc_heads){AT(const uint16_t, data[i]), (size_t)strides[i][0],
                                     (size_t)strides[i][1], (size_t)strides[i][2]};
    const struct uc_attention own = {.batch = (size_t)batch,
                                     .heads = (size_t)heads,
                                     .key_heads = (size_t)key_heads,
                                     .tokens = (size_t)tokens,
                                     .width = (size_t)width,
                                     .query = given[0],
                                     .key = given[1],
                                     .value = given[2],
                                     .scale = scale,
                                     .out = AT(uint16_t, out)};
    int done;
    PyThreadState *python = PyEval_SaveThread();
    done = compute(&own, threads ? threads : 1);
    PyEval_RestoreThread(python);
    if (done)
        Py_RETURN_NONE;
    return PyErr_NoMemory();
}

static PyObject *attention(PyObject *self, PyObject *args) {
    (void)self;
    return attend(args, uc_gram_usable, uc_attention);
}

static PyObject *attention_newest(PyObject *self, PyObject *args) {
    (void)self;
    return attend(args, uc_attention_newest_usable, uc_attention_newest);
}

static PyObject *attention_newest_usable(PyObject *self, PyObject *nothing) {
    (void)self, (void)nothing;
    return PyBool_FromLong(uc_attention_newest_usable());
}

static PyObject *head(PyObject *self, PyObject *args) {
    (void)self;
    address x, weight, out;
    Py_ssize_t tokens, rows, columns;
    unsigned threads;
    if (!PyArg_ParseTuple(args, "KKKnnnI", &x, &weight, &out, &tokens, &rows, &columns, &threads))
        return NULL;
    if (tokens < 0 || tokens > UC_HEAD_TOKENS || rows < 0 || columns < 1 ||
        columns % UC_HEAD_STEP || !uc_head_usable()) {
        PyErr_SetString(PyExc_ValueError, "sizes out of range, or not the instructions");
        return NULL;
    }
    const struct uc_head own = {.x = AT(const uint16_t, x),
                                .weight = AT(const uint16_t, weight),
                                .out = AT(uint16_t, out),
                                .tokens = (size_t)tokens,
                                .rows = (size_t)rows,
                                .columns = (size_t)columns};
    int done;
    PyThreadState *python = PyEval_SaveThread();
    done = uc_head(&own, threads ? threads : 1);
    PyEval_RestoreThread(python);
    if (done)
        Py_RETURN_NONE;
    return PyErr_NoMemory();
}

static PyObject *head_usable(PyObject *self, PyObject *nothing) {
    (void)self, (void)nothing;
    return PyBool_FromLong(uc_head_usable());
}

static PyObject *norm(PyObject *self, PyObject *args) {
    (void)self;
    address x, weight, out;
    Py_ssize_t rows, width;
    int dtype;
    float eps;
    unsigned lanes;
    if (!PyArg_ParseTuple(args, "KKKnnifI", &x, &weight, &out, &rows, &width, &dtype, &eps, &lanes))
        return NULL;
    if (rows < 0 || width < 1 || width > UC_SPAN_MAX || dtype < 0 || dtype >= UC_DTYPES ||
        (lanes != 4 && lanes != 8 && lanes != 16)) {
        PyErr_SetString(PyExc_ValueError, "sizes, dtype or lanes out of range");
        return NULL;
    }
    const struct uc_norm own = {.x = AT(const uint8_t, x),
                                .weight = AT(const uint8_t, weight),
                                .out = AT(uint8_t, out),
                                .rows = (size_t)rows,
                                .width = (size_t)width,
                                .dtype = (enum uc_dtype)dtype,
                                .eps = eps,
                                .lanes = lanes};
    PyThreadState *python = PyEval_SaveThread();
    uc_norm(&own);
    PyEval_RestoreThread(python);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"known", known, METH_NOARGS, "Return the names of all instruction sets, best first."},
    {"usable", usable, METH_NOARGS, "Return those that this machine can run."},
    {"isa", isa, METH_NOARGS, "Return the name of the instruction set in use."},
    {"use", use, METH_VARARGS, "Choose an instruction set by name."},
    {"share", share, METH_VARARGS, "Compute on another pool's threads, or with 0 on our own."},
    {"linear", linear, METH_VARARGS, "Multiply activations with a weight in panels."},
    {"block", block, METH_VARARGS, "Lay a quantized weight out in panels."},
    {"nearest", nearest, METH_VARARGS, "Round one block of columns of nearest plane."},
    {"attention", attention, METH_VARARGS, "Attend causally over whole windows in bfloat16."},
    {"attention_newest", attention_newest, METH_VARARGS, "Attend to all keys with one token."},
    {"attention_newest_usable", attention_newest_usable, METH_NOARGS,
     "Tell whether `attention_newest` runs on this machine."},
    {"head", head, METH_VARARGS, "Multiply a few tokens with a dense weight in bfloat16."},
    {"head_usable", head_usable, METH_NOARGS, "Tell whether `head` runs on this machine."},
    {"norm", norm, METH_VARARGS, "Divide rows by their root mean square and weigh their numbers."},
    {"gram_usable", gram_usable, METH_NOARGS, "Tell whether `gram` runs on this machine."},
    {"gram", gram, METH_VARARGS, "Add products of activations, summed over tokens, to a total."},
    {"spans", spans, METH_VARARGS, "Find the scale of every group of a weight."},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_cpu",
    "Products with quantized weights on the CPU.",
    -1,
    methods,
    NULL,
    NULL,
    NULL,
    NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) {
    PyObject *self = PyModule_Create(&module);
    if (self)
        uc_pool_prepare();
    return self;
}
