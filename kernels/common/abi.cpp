// What a loader must know before it calls anything else. Plain C ABI: no torch, no Python, no exceptions.

#define FASTVID_API extern "C" __attribute__((visibility("default")))

// Raised together with ABI_VERSION in fastvid/_native.py whenever a signature changes.
FASTVID_API int fastvid_abi_version(void) { return 1; }

// Best instruction set level that this processor and operating system can run.
FASTVID_API const char* fastvid_cpu_isa(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // the levels are spelled out by feature because clang before 16 and gcc before 12 know no level names here
    const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
    const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? "x86-64-v4" : v3 ? "x86-64-v3" : v2 ? "x86-64-v2" : "generic";
#else
    return "generic";
#endif
}
