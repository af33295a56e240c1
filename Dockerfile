# The server on CPUs. Kernels are chosen at run time, so one image runs on any x86-64.
#
#   docker build -t moe-dr .
#   docker run -p 8000:8000 -e DEEPSEEK_API_KEY=KEY -v "$PWD/model:/model:ro" moe-dr
#
# PyTorch's index of CPU builds, as PIP_EXTRA_INDEX_URL, leaves out the CUDA libraries:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=… -t moe-dr .
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY csrc csrc
COPY src src
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL=""
# torch's OpenMP; waits are short (docs/log.md)
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN PIP_EXTRA_INDEX_URL="$PIP_EXTRA_INDEX_URL" pip install --no-cache-dir /wheels/*.whl && useradd --create-home server
USER server
EXPOSE 8000
# /health needs no key
HEALTHCHECK --start-period=5m CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["deepseek"]
CMD ["serve", "/model", "--host", "0.0.0.0"]
