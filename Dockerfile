# Two stages: the first installs what uv.lock says, and only that, and lists it; the second carries the result.
#
# The service writes to its data and to /tmp, needs no capability, and so runs with everything else locked away:
#
#   docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#       --init --stop-timeout 60 -v metering:/var/lib/metering IMAGE
#
# --init reaps what an embedded Postgres that was killed leaves; a drain and its end take longer than Docker's 10 s.
#
# Settings are METERING_* variables or flags, given when it runs; the image holds none that is secret.
#
# A tag can be moved. A build service pins the base by digest: --build-arg PYTHON=python:3.11-slim-bookworm@sha256:…
# Slim and not distroless: initdb, which makes the cluster of the embedded Postgres, starts its helpers with /bin/sh.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
# Bytecode is compiled here, as nothing can write it later.
ENV UV_NO_CACHE=1 UV_NO_CONFIG=1 UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /src
COPY pyproject.toml uv.lock README.md ./
# uv itself comes in the lock's version, checked by the lock's hashes.
RUN python -c "import tomllib; \
        uv = next(p for p in tomllib.load(open('uv.lock', 'rb'))['package'] if p['name'] == 'uv'); \
        print('uv==' + uv['version'], *('--hash=' + wheel['hash'] for wheel in uv['wheels']))" > /tmp/uv.txt \
    && python -m pip install --no-cache-dir --no-deps --only-binary :all: --require-hashes -r /tmp/uv.txt
# Dependencies before the code: they change less often. --locked fails when pyproject.toml has moved on without the
# lock; every file is checked by its hash, and --no-build runs nobody's setup code.
RUN UV_PROJECT_ENVIRONMENT=/opt/metering \
    uv sync --locked --no-build --no-install-project --all-extras --no-extra dev --no-default-groups
RUN UV_PROJECT_ENVIRONMENT=/opt/tools \
    uv sync --locked --no-build --no-install-project --only-group image
COPY generated generated
COPY deploy deploy
COPY service service
# Built by the locked hatchling, without isolation, in which a build would fetch one of its own.
RUN /opt/tools/bin/hatchling build -t wheel -d /tmp/dist \
    && uv pip install --python /opt/metering/bin/python --offline --no-deps /tmp/dist/*.whl
# What is in it, as CycloneDX: the Python packages, Postgres and Envoy among them. The base image's are not; its maker
# lists those. No times and random ids, so that the same lock gives the same list.
RUN /opt/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
        --output-file /opt/metering/sbom.cdx.json /opt/metering/bin/python

FROM ${PYTHON}
# A user with an entry in /etc/passwd: initdb of the embedded Postgres insists on one.
RUN groupadd --gid 10001 metering \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/metering --shell /usr/sbin/nologin metering \
    && install --directory --owner 10001 --group 10001 --mode 0700 /var/lib/metering
COPY --from=build /opt/metering /opt/metering
ENV PATH=/opt/metering/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 METERING_DATA_DIR=/var/lib/metering/data
# By number: Kubernetes' runAsNonRoot cannot judge a name.
USER 10001:10001
VOLUME /var/lib/metering
EXPOSE 50051
# Without an API key only loopback is allowed. To serve other hosts, make a key and set METERING_LISTEN=0.0.0.0:50051.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["metering", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["metering"]
CMD ["serve"]
