#include <dlfcn.h>

#include <cstdio>
#include <string>
#include <vector>

#include "fault.h"

namespace simt {

namespace {

std::string base_name(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? path : path.substr(slash + 1);
}

// The stub headers and the SIMT executor's are on the way of every call, and say nothing.
bool is_own_header(const std::string& line) {
  return line.starts_with("executor.h:") || line.starts_with("cuda_");
}

// addr2line's output: one "file:line (discriminator n)" for each level of inlining, inside out.
std::vector<std::string> inlined_lines(const std::string& module, const std::string& offset) {
  std::vector<std::string> lines;
  const std::string command = "addr2line -i -e '" + module + "' " + offset + " 2>/dev/null";
  FILE* const pipe = popen(command.c_str(), "r");
  if (!pipe) return lines;
  char text[4096];
  while (fgets(text, sizeof(text), pipe)) {
    std::string line = text;
    line = base_name(line.substr(0, line.find_first_of(" \n")));
    if (line.find('?') == std::string::npos && !line.ends_with(":0") && !is_own_header(line))
      lines.push_back(line);
  }
  pclose(pipe);
  return lines;
}

}  // namespace

std::string source_line(uint32_t pc) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&source_line), &here);
  char offset[32];
  snprintf(offset, sizeof(offset), "0x%x", pc - 1);  // inside the call, not after it
  std::string text;
  for (const std::string& line : inlined_lines(here.dli_fname, offset)) {
    if (text.empty()) {
      text = line;
    } else {
      text.insert(0, line + " > ");
    }
  }
  return text.empty() ? base_name(here.dli_fname) + "+" + offset : text;
}

}  // namespace simt
