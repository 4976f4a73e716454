// Weights become panels: once a call, so that a tile reads them side by side whatever their strides and their type.
#pragma once

#include "axial_attention/cpu_projected_plan.h"

namespace fastvid::FASTVID_LEVEL {
namespace {

// A row of a weight [out, in], which is a column of a panel.
struct Column {
    const void* data;  // null: zeros
    int64_t step;
    int32_t type;
};

inline Column column_of(const Matrix& matrix, int64_t row) {
    return {(const char*)matrix.data + row * matrix.strides[0] * bytes_of(matrix.type), matrix.strides[1], matrix.type};
}

// A group's columns are, head by head, those of its query, its key and its value.
inline Column column_in(const Plan& plan, int64_t group, int64_t column) {
    const SelfAttentionCall& call = plan.call;
    const int64_t head = column / plan.head_width, part = column % plan.head_width;
    if (head >= plan.heads_of(group)) return {nullptr, 0, FLOAT32};
    const int64_t a = group * plan.together + head;
    if (part < call.E) return column_of(call.to_q, a * call.E + part);
    if (part < 2 * call.E) return column_of(call.to_k, a * call.E + part - call.E);
    return column_of(call.to_v, a * call.D + part - 2 * call.E);
}

inline Column column_out(const Plan& plan, int64_t column) {
    return column < plan.call.Cout ? column_of(plan.call.to_out, column) : Column{nullptr, 0, FLOAT32};
}

inline void pack_column(const Column& column, int64_t count, float* to) {
    for (int64_t k = 0; k < count; ++k)
        to[k * PANEL] = column.data ? element(column.data, column.type, k * column.step) : 0;
}

// LANES columns of `count` elements each.
inline void pack_columns(const Column* columns, int64_t count, float* to) {
    const void* rows[LANES];
    bool alike = columns[0].data;
    for (int lane = 0; lane < LANES; ++lane) {
        rows[lane] = columns[lane].data;
        alike = alike && rows[lane] && columns[lane].step == columns[0].step && columns[lane].type == columns[0].type;
    }
    if (alike) return turn_keys(rows, {nullptr, columns[0].step, columns[0].type}, count, to);
    for (int lane = 0; lane < LANES; ++lane) pack_column(columns[lane], count, to + lane);
}

inline void pack_in(const Plan& plan, int64_t panel) {
    const int64_t group = panel / plan.group_panels, first = panel % plan.group_panels * PANEL, C = plan.call.C;
    for (int64_t half = 0; half < PANEL; half += LANES) {
        Column columns[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) columns[lane] = column_in(plan, group, first + half + lane);
        pack_columns(columns, C, plan.packed_in + panel * C * PANEL + half);
    }
}

inline void pack_out(const Plan& plan, int64_t panel) {
    const SelfAttentionCall& call = plan.call;
    for (int64_t half = 0; half < PANEL; half += LANES) {
        Column columns[LANES];
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const int64_t column = panel * PANEL + half + lane;
            columns[lane] = column_out(plan, column);
            plan.bias[column] = call.bias && column < call.Cout ? call.bias[column] : 0;
        }
        pack_columns(columns, plan.hidden, plan.packed_out + panel * plan.hidden * PANEL + half);
    }
}

}  // namespace
}  // namespace fastvid::FASTVID_LEVEL
