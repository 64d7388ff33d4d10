// A stand-in for libnvidia-ml.so.1 on machines without an NVIDIA driver. Two GPUs, numbered against their PCI order. The
// values of the H100 are what driver 580 reports of an H100 SXM; OLD leaves out the functions that came with driver 510.
#include <cstdlib>
#include <cstring>

typedef struct Device* nvmlDevice_t;
typedef int nvmlReturn_t;

struct Device {
    const char* name;
    const char* uuid;
    unsigned long long memory;
    int major, minor;
    unsigned cores, bus_width, memory_mhz, sm_mhz, pci_bus;
};

struct PciInfo {
    char bus_id_legacy[16];
    unsigned domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
};

struct Memory {
    unsigned long long total, free, used;
};

struct Attributes {
    unsigned multiprocessors, engines_and_slices[7];
    unsigned long long memory_mib;
};

static Device devices[] = {
    {"NVIDIA A100-SXM4-80GB", "GPU-9fb42d6f-7d6b-368f-f79c-3c3e784c93f6", 85899345920ULL, 8, 0, 6912, 5120, 1593, 1410, 0x4e},
    {"NVIDIA H100 80GB HBM3", "GPU-4d8a22f6-e8e8-86e5-4b1a-d8fc31360a40", 85520809984ULL, 9, 0, 16896, 5120, 2619, 1980, 0x0f},
};
static Device mig_device = {
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "MIG-1d11a5f4-0000-5c1d-9a0d-1e4b7f0c1a01", 0, 9, 0, 0, 0, 0, 0, 0};
static int open_sessions = 0;
static unsigned looks = 0;

static bool mode(const char* name) {
    const char* value = std::getenv("FAKE_NVML");
    return value && std::strcmp(value, name) == 0;
}

static nvmlReturn_t write(const char* text, char* buffer, unsigned size) {
    if (std::strlen(text) >= size) return 7;
    std::strcpy(buffer, text);
    return 0;
}

extern "C" {
int fake_open_sessions() { return open_sessions; }

nvmlReturn_t nvmlInit_v2() {
    if (mode("mismatch")) return 18;
    ++open_sessions;
    return 0;
}
nvmlReturn_t nvmlShutdown() {
    --open_sessions;
    return 0;
}
const char* nvmlErrorString(nvmlReturn_t status) {
    return status == 18 ? "Driver/library version mismatch" : status == 15 ? "GPU is lost" : "Unknown Error";
}
nvmlReturn_t nvmlDeviceGetCount_v2(unsigned* count) {
    *count = mode("no-gpu") ? 0 : 2;
    return 0;
}
nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned index, nvmlDevice_t* device) {
    if (mode("lost") || (mode("one-lost") && index == 0)) return 15;
    *device = &devices[index];
    return 0;
}
nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char* buffer, unsigned size) { return write(device->name, buffer, size); }
nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char* buffer, unsigned size) { return write(device->uuid, buffer, size); }
nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, PciInfo* pci) {
    std::memset(pci, 0, sizeof *pci);
    pci->bus = device->pci_bus;
    return 0;
}
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, Memory* memory) {
    memory->total = device->memory;
    memory->free = memory->used = 1;
    return 0;
}
nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int* major, int* minor) {
    *major = mode("unknown-architecture") ? 99 : device->major;
    *minor = device->minor;
    return 0;
}
nvmlReturn_t nvmlDeviceGetMaxClockInfo(nvmlDevice_t device, unsigned type, unsigned* mhz) {
    if (type != 1 && type != 2) return 2;
    *mhz = type == 2 ? device->memory_mhz : device->sm_mhz;
    return 0;
}
nvmlReturn_t nvmlDeviceGetHandleByUUID(const char* uuid, nvmlDevice_t* device) {
    for (Device& found : devices)
        if (!std::strcmp(found.uuid, uuid)) return *device = &found, 0;
    return 6;
}
// A GPU at work: each look at the multiprocessors' clock finds it at the next of three levels, and power with it.
nvmlReturn_t nvmlDeviceGetClockInfo(nvmlDevice_t device, unsigned type, unsigned* mhz) {
    if (type != 1 && type != 2) return 2;
    *mhz = type == 2 ? device->memory_mhz : device->sm_mhz - 15 * (++looks % 3);
    return 0;
}
nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t, unsigned* milliwatts) {
    *milliwatts = 600000 + 1500 * (looks % 3);
    return 0;
}
nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t, unsigned sensor, unsigned* celsius) {
    *celsius = 60 + looks % 3;
    return sensor ? 2 : 0;
}
static nvmlReturn_t reasons(nvmlDevice_t device, unsigned long long* bits) {
    *bits = device != &devices[1] ? 1 : mode("hot") ? 0x20 | 0x04 : 1;  // 1: idle
    return 0;
}
#ifdef OLD
nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long* bits) {
    return reasons(device, bits);
}
#else
nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long* bits) {
    return reasons(device, bits);
}
#endif
#ifndef OLD
nvmlReturn_t nvmlDeviceGetNumGpuCores(nvmlDevice_t device, unsigned* cores) {
    *cores = device->cores;
    return 0;
}
nvmlReturn_t nvmlDeviceGetMemoryBusWidth(nvmlDevice_t device, unsigned* bits) {
    *bits = device->bus_width;
    return 0;
}
#endif
nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned* current, unsigned* pending) {
    if (device != &devices[1]) return 3;
    *current = *pending = mode("mig");
    return 0;
}
nvmlReturn_t nvmlDeviceGetMaxMigDeviceCount(nvmlDevice_t, unsigned* count) {
    *count = 7;
    return 0;
}
nvmlReturn_t nvmlDeviceGetMigDeviceHandleByIndex(nvmlDevice_t, unsigned index, nvmlDevice_t* device) {
    if (index != 2) return 6;
    *device = &mig_device;
    return 0;
}
nvmlReturn_t nvmlDeviceGetAttributes_v2(nvmlDevice_t device, Attributes* attributes) {
    if (device != &mig_device) return 3;
    std::memset(attributes, 0, sizeof *attributes);
    attributes->multiprocessors = 60;
    attributes->memory_mib = 40448;
    return 0;
}
}
